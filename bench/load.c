/*
 * The publisher of the bench: QoS 1 messages with a running sequence, over a socket of its own.
 *
 *   load -p PORT [-n COUNT] [-s BYTES] [-t TOPICS] [-d MILLISECONDS] [-r RATE | -c FILE [-w WINDOW]]
 *
 * With neither -r nor -c it publishes as fast as the broker takes it. With -r, message k is due at t0 + k / RATE: the
 * schedule never slips, and what is late is sent at once. With -c it sends while less than WINDOW messages are sent
 * and not yet stored; how many are stored is the native 64-bit number that somebody else keeps in FILE.
 *
 * Printed: {"t0": CLOCK_MONOTONIC in ns} at the start (t0 is MILLISECONDS after it); when all are acknowledged
 * {"sent": COUNT, "late_ms": the most that a message left after it was due}. Without COUNT it goes on until SIGTERM. It
 * does not use libmosquitto because that needs a system call or two for each message: on a small machine the publisher
 * would take the CPU from those it feeds.
 *
 * Message k goes to bench/line-1/device-DDDDD/readings, DDDDD = k modulo TOPICS. BYTES above 110 are filled with
 * readings; payload() of bench/harness.py says the same in Python.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	IN_FLIGHT = 4000, /* below the broker's receive maximum */
	BURST = 64 * 1024,
	LARGEST = 1024 * 1024,
	NANOSECONDS = 1000000000,
	PATIENCE_MS = 60000, /* without a sign of the broker */
};

struct load {
	int fd;
	uint64_t count, size, topics, window, delay_ms;
	double rate;
	_Atomic uint64_t *stored; /* NULL: no credit is kept */
	uint64_t t0;              /* ns */
	double latest;            /* ns; the most that a message was late */
	uint64_t sent, acknowledged;
	size_t out_length, in_length;
	char out[BURST + 2 * LARGEST];
	unsigned char in[BURST];
};

static volatile sig_atomic_t stopping;

static void on_signal(int number)
{
	(void)number;
	stopping = 1;
}

static void die(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * NANOSECONDS + (uint64_t)time.tv_nsec;
}

static size_t append_readings(char *text, size_t length, uint64_t sequence, uint64_t size)
{
	length += (size_t)sprintf(text + length, ",\"readings\":[");
	for (uint64_t i = 0; i == 0 || length + 2 < size; i++) {
		uint64_t value = (sequence * 31 + i * 7) % 5000;
		length += (size_t)sprintf(
		    text + length, "%s{\"sensor\":\"s-%02d\",\"value\":%d.%02d,\"count\":%d,\"ok\":true}",
		    i == 0 ? "" : ",", (int)(i % 100), (int)(value / 100), (int)(value % 100), (int)(i * 3));
	}
	text[length++] = ']';
	return length;
}

static size_t write_payload(const struct load *load, char *text, uint64_t sequence)
{
	size_t length =
	    (size_t)sprintf(text,
	                    "{\"device\":\"device-%05lu\",\"sequence\":%lu,\"time\":\"2026-11-22T20:18:24.123Z\","
	                    "\"temperature\":21.53,\"online\":true",
	                    (unsigned long)(sequence % load->topics), (unsigned long)sequence);
	if (load->size > 110)
		length = append_readings(text, length, sequence, load->size);
	text[length++] = '}';
	return length;
}

static size_t put_length(char *at, size_t length)
{
	size_t used = 0;
	do {
		at[used] = (char)(length % 128 + (length >= 128 ? 128 : 0));
		length /= 128;
		used++;
	} while (length > 0);
	return used;
}

static void append_publish(struct load *load)
{
	static char text[2 * LARGEST];
	uint16_t id = (uint16_t)(load->sent % 65535 + 1);
	char topic[64], *at = load->out + load->out_length;
	size_t length = write_payload(load, text, load->sent);
	size_t named =
	    (size_t)sprintf(topic, "bench/line-1/device-%05lu/readings", (unsigned long)(load->sent % load->topics));
	*at++ = 0x32;
	at += put_length(at, 2 + named + 2 + 1 + length);
	*at++ = 0;
	*at++ = (char)named;
	memcpy(at, topic, named);
	at += named;
	*at++ = (char)(id >> 8);
	*at++ = (char)(id & 255);
	*at++ = 0; /* no properties */
	memcpy(at, text, length);
	load->out_length = (size_t)(at + length - load->out);
	load->sent++;
}

/* Before the oldest message that is due leaves. */
static void note_lateness(struct load *load)
{
	double late = (double)(now() - load->t0) - (double)load->sent / load->rate * 1e9;
	load->latest = late > load->latest ? late : load->latest;
}

static void flush_out(struct load *load)
{
	for (size_t done = 0; done < load->out_length;) {
		ssize_t written = send(load->fd, load->out + done, load->out_length - done, MSG_NOSIGNAL);
		if (written < 0 && errno != EINTR)
			die("send");
		done += written > 0 ? (size_t)written : 0;
	}
	load->out_length = 0;
}

/* Only CONNACK and PUBACK are expected, both shorter than 128 bytes. */
static void take_packet(struct load *load, const unsigned char *packet)
{
	bool puback = packet[0] == 0x40, connack = packet[0] == 0x20;
	int reason = connack ? packet[3] : packet[1] > 2 ? packet[4] : 0;
	if ((!puback && !connack) || packet[1] > 127 || reason >= 0x80) {
		fprintf(stderr, "load: the broker sent packet 0x%02x, reason 0x%02x\n", packet[0], reason);
		exit(1);
	}
	load->acknowledged += puback;
}

static bool read_packets(struct load *load, int wait_ms)
{
	struct pollfd poll_fd = {.fd = load->fd, .events = POLLIN};
	if (poll(&poll_fd, 1, wait_ms) <= 0)
		return false;
	ssize_t got = recv(load->fd, load->in + load->in_length, sizeof load->in - load->in_length, MSG_DONTWAIT);
	if (got == 0 || (got < 0 && errno != EINTR && errno != EAGAIN))
		die("the broker has closed the connection");
	load->in_length += got > 0 ? (size_t)got : 0;
	size_t at = 0;
	while (at + 2 <= load->in_length && at + 2 + load->in[at + 1] <= load->in_length) {
		take_packet(load, load->in + at);
		at += 2 + (size_t)load->in[at + 1];
	}
	memmove(load->in, load->in + at, load->in_length - at);
	load->in_length -= at;
	return true;
}

static void connect_broker(struct load *load, int port)
{
	static const char hello[] = "\x10\x17\0\4MQTT\5\2\1\x2c\0\0\x0a"
				    "bench-load"; /* clean start, keepalive 300 s */
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	int on = 1;
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	load->fd = socket(AF_INET, SOCK_STREAM, 0);
	if (load->fd < 0 || connect(load->fd, (struct sockaddr *)&address, sizeof address) != 0)
		die("connect");
	setsockopt(load->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	memcpy(load->out, hello, sizeof hello - 1);
	load->out_length = sizeof hello - 1;
	flush_out(load);
	if (!read_packets(load, PATIENCE_MS))
		die("no answer to CONNECT");
}

/* How many messages may leave at this moment. */
static uint64_t allowed(const struct load *load)
{
	uint64_t on_the_way = load->sent - load->acknowledged, allowed = IN_FLIGHT - on_the_way;
	if (load->count > 0 && load->count - load->sent < allowed)
		allowed = load->count - load->sent;
	if (load->stored != NULL) {
		uint64_t open = load->sent - atomic_load_explicit(load->stored, memory_order_relaxed);
		uint64_t credit = open < load->window ? load->window - open : 0;
		allowed = credit < allowed ? credit : allowed;
	}
	if (load->rate > 0) {
		uint64_t time = now();
		uint64_t due = time < load->t0 ? 0 : (uint64_t)((double)(time - load->t0) / 1e9 * load->rate) + 1;
		uint64_t open = due > load->sent ? due - load->sent : 0;
		allowed = open < allowed ? open : allowed;
	}
	return allowed;
}

/* Nothing may leave: wait for the next message's time, or for what else holds it up. */
static void idle(struct load *load)
{
	if (load->rate > 0 && load->sent - load->acknowledged < IN_FLIGHT) {
		uint64_t due = load->t0 + (uint64_t)((double)load->sent / load->rate * 1e9);
		struct timespec until = {.tv_sec = (time_t)(due / NANOSECONDS), .tv_nsec = (long)(due % NANOSECONDS)};
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
		read_packets(load, 0);
	} else if (!read_packets(load, 1) && load->stored != NULL) {
		static const struct timespec pause = {.tv_nsec = 200000};
		nanosleep(&pause, NULL);
	}
}

static void publish(struct load *load)
{
	while (!stopping && (load->count == 0 || load->sent < load->count)) {
		uint64_t messages = allowed(load);
		if (messages == 0) {
			idle(load);
			continue;
		}
		if (load->rate > 0)
			note_lateness(load);
		for (; messages > 0 && load->out_length < BURST; messages--)
			append_publish(load);
		flush_out(load);
		read_packets(load, 0);
	}
	while (load->acknowledged < load->sent)
		if (!read_packets(load, PATIENCE_MS))
			die("not all is acknowledged");
}

static _Atomic uint64_t *map_counter(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	void *counter = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof(uint64_t), PROT_READ, MAP_SHARED, fd, 0);
	if (counter == MAP_FAILED)
		die(path);
	close(fd);
	return counter;
}

static int parse(struct load *load, int argc, char **argv)
{
	int port = 0;
	for (int option; (option = getopt(argc, argv, "p:n:s:t:d:r:c:w:")) != -1;) {
		switch (option) {
		case 'p':
			port = atoi(optarg);
			break;
		case 'n':
			load->count = strtoull(optarg, NULL, 10);
			break;
		case 's':
			load->size = strtoull(optarg, NULL, 10);
			break;
		case 't':
			load->topics = strtoull(optarg, NULL, 10);
			break;
		case 'd':
			load->delay_ms = strtoull(optarg, NULL, 10);
			break;
		case 'r':
			load->rate = atof(optarg);
			break;
		case 'c':
			load->stored = map_counter(optarg);
			break;
		case 'w':
			load->window = strtoull(optarg, NULL, 10);
			break;
		default:
			exit(2);
		}
	}
	if (port == 0 || load->topics == 0 || load->size > LARGEST)
		exit(2);
	return port;
}

int main(int argc, char **argv)
{
	static struct load load = {.size = 110, .topics = 100, .window = 20000};
	int port = parse(&load, argc, argv);
	struct sigaction action = {.sa_handler = on_signal};
	sigaction(SIGTERM, &action, NULL);
	connect_broker(&load, port);
	load.t0 = now() + load.delay_ms * 1000000;
	printf("{\"t0\": %lu}\n", (unsigned long)load.t0);
	fflush(stdout);
	publish(&load);
	printf("{\"sent\": %lu, \"late_ms\": %.3f}\n", (unsigned long)load.sent, load.latest / 1e6);
	close(load.fd);
	return 0;
}
