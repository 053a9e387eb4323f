/*
 * The floor of the bench: libmosquitto and nothing else.
 *
 *   bare session PORT FILTER CLIENT              make a persistent session subscribed to FILTER, disconnect
 *   bare forget PORT CLIENT                      end that session
 *   bare subscribe PORT FILTER CLIENT WINDOW COUNT [COUNTER]
 *                                                take up the session, discard COUNT messages, exit; COUNT 0: until
 * SIGTERM. In the file COUNTER is kept how many came, a native 64-bit number
 *   bare loop PORT …                             the same by mosquitto_loop(), as most programs are written: it asks
 * the kernel before each packet whether there is something to read. subscribe is as fast as the library goes
 *
 * MQTT 5, 127.0.0.1.
 */
#include <fcntl.h>
#include <mosquitto.h>
#include <mqtt_protocol.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static uint64_t seen, wanted;
static const char *filter;
static bool session_only;
static _Atomic uint64_t *counter;
static volatile sig_atomic_t done;

static void on_signal(int number)
{
	(void)number;
	done = 1;
}

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
	else
		done = 1;
}

static void on_subscribe(struct mosquitto *client, void *context, int id, int count, const int *granted)
{
	(void)client, (void)context, (void)id, (void)count, (void)granted;
	if (session_only)
		done = 1;
}

static void on_message(struct mosquitto *client, void *context, const struct mosquitto_message *message)
{
	(void)client, (void)context, (void)message;
	seen++;
	if (counter != NULL)
		atomic_store_explicit(counter, seen, memory_order_relaxed);
	if (seen == wanted)
		done = 1;
}

static struct mosquitto *connect_client(const char *id, int port, int window, bool persistent)
{
	struct mosquitto *client = mosquitto_new(id, !persistent, NULL);
	mosquitto_property *properties = NULL;
	if (persistent)
		mosquitto_property_add_int32(&properties, MQTT_PROP_SESSION_EXPIRY_INTERVAL, 3600);
	mosquitto_int_option(client, MOSQ_OPT_PROTOCOL_VERSION, MQTT_PROTOCOL_V5);
	mosquitto_int_option(client, MOSQ_OPT_RECEIVE_MAXIMUM, window);
	mosquitto_connect_v5_callback_set(client, on_connect);
	mosquitto_subscribe_callback_set(client, on_subscribe);
	mosquitto_message_callback_set(client, on_message);
	if (mosquitto_connect_bind_v5(client, "127.0.0.1", port, 60, NULL, properties) != MOSQ_ERR_SUCCESS) {
		perror("bare: connect");
		exit(1);
	}
	mosquitto_property_free_all(&properties);
	return client;
}

static void map_counter(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	void *mapped = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *counter, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (mapped == MAP_FAILED) {
		perror(path);
		exit(1);
	}
	close(fd);
	counter = mapped;
}

static struct mosquitto *start(int argc, char **argv)
{
	int port = atoi(argv[2]);
	if (strcmp(argv[1], "forget") == 0)
		return connect_client(argv[3], port, 1000, false);
	if (argc < 5)
		exit(2);
	filter = argv[3];
	session_only = strcmp(argv[1], "session") == 0;
	if (session_only)
		return connect_client(argv[4], port, 1000, true);
	if (argc < 7)
		exit(2);
	wanted = strtoull(argv[6], NULL, 10);
	if (argc > 7)
		map_counter(argv[7]);
	return connect_client(argv[4], port, atoi(argv[5]), true);
}

static void check(int result)
{
	if (result != MOSQ_ERR_SUCCESS && !done) {
		fprintf(stderr, "bare: %s after %lu messages\n", mosquitto_strerror(result), (unsigned long)seen);
		exit(1);
	}
}

/* Wait for something, then read until a call brings no message. */
static void turn(struct mosquitto *client)
{
	struct pollfd ready = {.fd = mosquitto_socket(client),
	                       .events = mosquitto_want_write(client) ? POLLIN | POLLOUT : POLLIN};
	poll(&ready, 1, 100);
	if (ready.revents & POLLOUT)
		check(mosquitto_loop_write(client, 1));
	if (ready.revents & (POLLIN | POLLHUP | POLLERR)) {
		uint64_t before;
		do {
			before = seen;
			check(mosquitto_loop_read(client, 1));
		} while (seen != before && !done);
	}
	check(mosquitto_loop_misc(client));
}

int main(int argc, char **argv)
{
	if (argc < 4)
		return 2;
	struct sigaction action = {.sa_handler = on_signal};
	sigaction(SIGTERM, &action, NULL);
	mosquitto_lib_init();
	struct mosquitto *client = start(argc, argv);
	bool loop = strcmp(argv[1], "loop") == 0;
	while (!done) {
		if (loop)
			check(mosquitto_loop(client, 100, 1));
		else
			turn(client);
	}
	mosquitto_disconnect(client);
	mosquitto_loop(client, 100, 1);
	mosquitto_destroy(client);
	return 0;
}
