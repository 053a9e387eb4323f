/*
 * The floor of the publisher's measurements: libmosquitto and nothing else.
 *
 *   publish PORT TOPIC RATE
 *
 * 110-byte JSON messages at QoS 1 until SIGTERM, RATE a second; RATE 0: as fast as it goes. Message k is due at the
 * start plus k / RATE; what is late is sent at once. At most 1000 are unacknowledged. Printed at the end: how many were
 * acknowledged. MQTT 5, 127.0.0.1.
 */
#include <mosquitto.h>
#include <mqtt_protocol.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { IN_FLIGHT = 1000 };

static long sent, acknowledged;
static volatile sig_atomic_t stopping;

static void on_signal(int number)
{
	(void)number;
	stopping = 1;
}

static void on_publish(struct mosquitto *client, void *context, int id)
{
	(void)client, (void)context, (void)id;
	acknowledged++;
}

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static struct mosquitto *connect_client(int port)
{
	struct mosquitto *client = mosquitto_new("bare-publisher", true, NULL);
	mosquitto_int_option(client, MOSQ_OPT_PROTOCOL_VERSION, MQTT_PROTOCOL_V5);
	mosquitto_int_option(client, MOSQ_OPT_SEND_MAXIMUM, IN_FLIGHT);
	mosquitto_int_option(client, MOSQ_OPT_TCP_NODELAY, 1);
	mosquitto_publish_callback_set(client, on_publish);
	if (mosquitto_connect(client, "127.0.0.1", port, 60) != MOSQ_ERR_SUCCESS) {
		perror("publish: connect");
		exit(1);
	}
	return client;
}

static void publish_due(struct mosquitto *client, const char *topic, long due)
{
	char payload[160];
	for (; sent < due && sent - acknowledged < IN_FLIGHT; sent++) {
		int length =
		    snprintf(payload, sizeof payload,
		             "{\"device\":\"device-%03ld\",\"sequence\":%ld,\"time\":\"2026-11-22T20:18:24.123Z\","
		             "\"temperature\":21.53,\"online\":true}",
		             sent % 100, sent);
		mosquitto_publish(client, NULL, topic, length, payload, 1, false);
	}
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: publish PORT TOPIC RATE\n");
		return 2;
	}
	double rate = atof(argv[3]);
	sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_signal}, NULL);
	mosquitto_lib_init();
	struct mosquitto *client = connect_client(atoi(argv[1]));
	double start = now();
	while (!stopping || acknowledged < sent) {
		if (!stopping)
			publish_due(client, argv[2], rate > 0 ? (long)((now() - start) * rate) : sent + IN_FLIGHT);
		if (mosquitto_loop(client, rate > 0 ? 1 : 100, 1) != MOSQ_ERR_SUCCESS && !stopping) {
			fprintf(stderr, "publish: connection lost after %ld messages\n", acknowledged);
			return 1;
		}
	}
	printf("%ld\n", acknowledged);
	mosquitto_disconnect(client);
	mosquitto_loop(client, 100, 1);
	mosquitto_destroy(client);
	return 0;
}
