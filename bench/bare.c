/*
 * The floor of the drain benchmark: libmosquitto and nothing else.
 *
 *   bare publish   PORT COUNT TOPIC           publish COUNT 110-byte JSON messages at QoS 1, exit when all are
 * acknowledged bare subscribe PORT COUNT TOPIC CLIENT WINDOW   take up a persistent session, discard COUNT messages,
 * exit bare session   PORT TOPIC CLIENT          make a persistent session subscribed to TOPIC, disconnect
 *
 * MQTT 5, 127.0.0.1. A blocking loop of the library's own.
 */
#include <mosquitto.h>
#include <mqtt_protocol.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long seen, wanted;
static const char *filter;
static bool session_only, done;

static void on_connect(struct mosquitto *client, void *context, int reason, int flags,
                       const mosquitto_property *properties)
{
	(void)context, (void)flags, (void)properties;
	if (reason != 0) {
		fprintf(stderr, "bare: refused: %s\n", mosquitto_reason_string(reason));
		exit(1);
	}
	if (filter != NULL)
		mosquitto_subscribe(client, NULL, filter, 1);
}

static void on_subscribe(struct mosquitto *client, void *context, int id, int count, const int *granted)
{
	(void)client, (void)context, (void)id, (void)count, (void)granted;
	done = session_only;
}

static void on_message(struct mosquitto *client, void *context, const struct mosquitto_message *message)
{
	(void)client, (void)context, (void)message;
	done = ++seen >= wanted;
}

static void on_publish(struct mosquitto *client, void *context, int id)
{
	(void)client, (void)context, (void)id;
	done = ++seen >= wanted;
}

static struct mosquitto *connect_client(const char *id, int port, int window, bool persistent)
{
	struct mosquitto *client = mosquitto_new(id, !persistent, NULL);
	mosquitto_property *properties = NULL;
	if (persistent)
		mosquitto_property_add_int32(&properties, MQTT_PROP_SESSION_EXPIRY_INTERVAL, 3600);
	mosquitto_int_option(client, MOSQ_OPT_PROTOCOL_VERSION, MQTT_PROTOCOL_V5);
	mosquitto_int_option(client, MOSQ_OPT_RECEIVE_MAXIMUM, window);
	mosquitto_int_option(client, MOSQ_OPT_SEND_MAXIMUM, window);
	mosquitto_connect_v5_callback_set(client, on_connect);
	mosquitto_subscribe_callback_set(client, on_subscribe);
	mosquitto_message_callback_set(client, on_message);
	mosquitto_publish_callback_set(client, on_publish);
	if (mosquitto_connect_bind_v5(client, "127.0.0.1", port, 60, NULL, properties) != MOSQ_ERR_SUCCESS) {
		perror("bare: connect");
		exit(1);
	}
	mosquitto_property_free_all(&properties);
	return client;
}

static void publish_window(struct mosquitto *client, const char *topic, long *sent)
{
	char payload[160];
	while (*sent < wanted && *sent - seen < 1000) {
		int length =
		    snprintf(payload, sizeof payload,
		             "{\"device\":\"device-%03ld\",\"sequence\":%ld,\"time\":\"2026-11-22T20:18:24.123Z\","
		             "\"temperature\":21.53,\"online\":true}",
		             *sent % 100, *sent);
		mosquitto_publish(client, NULL, topic, length, payload, 1, false);
		++*sent;
	}
}

int main(int argc, char **argv)
{
	if (argc < 5)
		return 2;
	bool publish = strcmp(argv[1], "publish") == 0;
	int port = atoi(argv[2]);
	struct mosquitto *client;
	mosquitto_lib_init();
	if (publish) {
		wanted = atol(argv[3]);
		client = connect_client("bare-publisher", port, 1000, false);
	} else if (strcmp(argv[1], "session") == 0) {
		session_only = true;
		filter = argv[3];
		client = connect_client(argv[4], port, 1000, true);
	} else {
		wanted = atol(argv[3]);
		filter = argv[4];
		client = connect_client(argv[5], port, argc > 6 ? atoi(argv[6]) : 4096, true);
	}
	long sent = 0;
	while (!done) {
		if (publish)
			publish_window(client, argv[4], &sent);
		if (mosquitto_loop(client, 100, 1) != MOSQ_ERR_SUCCESS) {
			fprintf(stderr, "bare: connection lost after %ld messages\n", seen);
			return 1;
		}
	}
	mosquitto_disconnect(client);
	mosquitto_loop(client, 100, 1);
	mosquitto_destroy(client);
	return 0;
}
