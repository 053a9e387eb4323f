/*
 * See http.h.
 *
 * libmicrohttpd watches its sockets through an epoll descriptor of its own; the loop polls that one, and MHD_run() does
 * what is due without blocking. Its memory for a connection has a fixed size, headers included, and its time-out counts
 * from the last byte, which a client that sends one now and then would never meet. So the age of connections is watched
 * here: they stand in a list, the oldest first, and one that has to go has its socket shut down, which libmicrohttpd
 * takes for a client that hangs up.
 */
#define _GNU_SOURCE
#include "http.h"

#include "log.h"
#include "memory.h"

#include <arpa/inet.h>
#include <errno.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	CLIENTS_MOST = 16,
	CLIENTS_HARD =
	    64, /* with those that are being ended; never reached, for libmicrohttpd accepts a few at a time */
	AGE_MOST_MS = 10000,
	ENDING_MS = 50,
	REQUEST_BYTES = 16384, /* libmicrohttpd's memory for one connection */
	BACKLOG = 128,
	SHARE = 10,            /* serving takes at most one SHAREth of the time */
	CREDIT_US = 20000,     /* but so much at once */
	MISDIRECTED = 421,     /* RFC 9110 §15.5.20 */
	COST_MOST_US = 100000, /* of one turn; longer, and the process was frozen or had no processor meanwhile */
};

static const char PLAIN[] = "text/plain; charset=utf-8";

struct client {
	struct client *next;
	struct http *http;
	int fd; /* libmicrohttpd's */
	uint64_t since;
	bool ended;
};

struct http {
	uv_loop_t *loop;
	struct http_handler handler;
	void *owner;
	struct MHD_Daemon *daemon;
	uv_poll_t poll;
	uv_timer_t wake;
	struct client *clients; /* the oldest first */
	int client_count;       /* not ended */
	int64_t credit_us;      /* what serving may still cost */
	uint64_t credit_at;     /* hrtime */
	bool resting;           /* the credit is used up */
	struct log_repeat complaint;
	void (*stopped)(void *owner);
	int handles;
};

/* ---- connections ---- */

static void end_client(struct client *client)
{
	client->ended = true;
	client->http->client_count--;
	shutdown(client->fd, SHUT_RDWR);
}

static struct client *oldest(const struct http *http)
{
	struct client *client = http->clients;
	while (client != NULL && client->ended)
		client = client->next;
	return client;
}

static void add_client(struct http *http, struct MHD_Connection *connection, void **slot)
{
	struct client *client = memory_zeroed(1, sizeof *client), **last = &http->clients;
	while (*last != NULL)
		last = &(*last)->next;
	*last = client;
	client->http = http;
	client->fd = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
	client->since = uv_now(http->loop);
	*slot = client;
	if (++http->client_count > CLIENTS_MOST)
		end_client(oldest(http));
}

static void remove_client(struct http *http, struct client *client)
{
	struct client **place = &http->clients;
	while (*place != client)
		place = &(*place)->next;
	*place = client->next;
	http->client_count -= !client->ended;
	free(client);
}

/* libmicrohttpd has accepted a connection, or is about to close one. */
static void on_connection(void *context, struct MHD_Connection *connection, void **slot,
                          enum MHD_ConnectionNotificationCode code)
{
	if (code == MHD_CONNECTION_NOTIFY_STARTED)
		add_client(context, connection, slot);
	else if (*slot != NULL)
		remove_client(context, *slot);
}

static void end_old_clients(struct http *http)
{
	struct client *client;
	while ((client = oldest(http)) != NULL && uv_now(http->loop) - client->since >= AGE_MOST_MS)
		end_client(client);
}

/* ---- requests ---- */

static bool is_one_of(const char *const *paths, const char *url)
{
	for (; *paths != NULL; paths++)
		if (strcmp(*paths, url) == 0)
			return true;
	return false;
}

/* Behind the host there is nothing, or a port. */
static bool is_port(const char *text)
{
	return text[0] == '\0' || (text[0] == ':' && text[1 + strspn(text + 1, "0123456789")] == '\0');
}

static bool is_bracketed_address(const char *host)
{
	struct in6_addr binary;
	char address[INET6_ADDRSTRLEN];
	size_t length = strcspn(host + 1, "]");
	if (length >= sizeof address || host[1 + length] != ']' || !is_port(host + length + 2))
		return false;
	snprintf(address, sizeof address, "%.*s", (int)length, host + 1);
	return inet_pton(AF_INET6, address, &binary) == 1;
}

/* The name without the dot that may end it. */
static size_t name_length(const char *name)
{
	size_t length = strcspn(name, ":");
	return length > 0 && name[length - 1] == '.' ? length - 1 : length;
}

static bool is_below(const char *name, size_t length, const char *domain)
{
	size_t tail = strlen(domain);
	return length > tail && strncasecmp(name + length - tail, domain, tail) == 0;
}

bool http_knows_host(const char *host, const char *const *hosts, size_t host_count)
{
	struct in_addr binary;
	char address[INET_ADDRSTRLEN] = "";
	if (host == NULL)
		return true;
	if (host[0] == '[')
		return is_bracketed_address(host);
	size_t length = name_length(host);
	if (!is_port(host + strcspn(host, ":")))
		return false;
	if (length < sizeof address)
		snprintf(address, sizeof address, "%.*s", (int)length, host);
	if (inet_pton(AF_INET, address, &binary) == 1 || strcasecmp(address, "localhost") == 0 ||
	    is_below(host, length, ".localhost") || is_below(host, length, ".local"))
		return true;
	for (size_t i = 0; i < host_count; i++)
		if (name_length(hosts[i]) == length && strncasecmp(hosts[i], host, length) == 0)
			return true;
	return false;
}

/* A request with two Hosts is for nobody. */
struct hosts {
	const char *first;
	int count;
};

static enum MHD_Result see_header(void *context, enum MHD_ValueKind kind, const char *name, const char *value)
{
	struct hosts *hosts = context;
	if (strcasecmp(name, MHD_HTTP_HEADER_HOST) == 0 && hosts->count++ == 0)
		hosts->first = value != NULL ? value : "";
	return MHD_YES;
}

static bool is_for_us(const struct http *http, struct MHD_Connection *connection)
{
	struct hosts hosts = {0};
	MHD_get_connection_values(connection, MHD_HEADER_KIND, see_header, &hosts);
	return hosts.count <= 1 && http_knows_host(hosts.first, http->handler.hosts, http->handler.host_count);
}

static void not_found(const struct http *http, struct http_answer *answer)
{
	char *text = memory_string("not found; there are:\n");
	for (const char *const *path = http->handler.paths; *path != NULL; path++) {
		char *more = memory_format("%s%s\n", text, *path);
		free(text);
		text = more;
	}
	*answer = (struct http_answer){404, PLAIN, text};
}

/* What was asked for is not repeated: it is a stranger's text. */
static void misdirected(struct http_answer *answer)
{
	*answer = (struct http_answer){
	    MISDIRECTED, PLAIN,
	    memory_string("the name in this request's Host is not known here; ask by address or as "
	                  "localhost, or add the name to http.hosts\n")};
}

static enum MHD_Result send_answer(struct MHD_Connection *connection, const struct http_answer *answer)
{
	struct MHD_Response *response =
	    MHD_create_response_from_buffer(strlen(answer->text), answer->text, MHD_RESPMEM_MUST_FREE);
	if (response == NULL) {
		free(answer->text);
		return MHD_NO;
	}
	MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, answer->content_type);
	MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
	MHD_add_response_header(response, "X-Content-Type-Options", "nosniff");
	MHD_add_response_header(response, "Referrer-Policy", "no-referrer");
	MHD_add_response_header(response, MHD_HTTP_HEADER_CONNECTION, "close");
	if (answer->status == MHD_HTTP_METHOD_NOT_ALLOWED)
		MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
	enum MHD_Result result = MHD_queue_response(connection, (unsigned)answer->status, response);
	MHD_destroy_response(response);
	return result;
}

/* The header of a request is complete. The answer is ready at once, so that no body is ever read: libmicrohttpd closes
 * the connection behind the answer instead. */
static enum MHD_Result on_request(void *context, struct MHD_Connection *connection, const char *url, const char *method,
                                  const char *version, const char *body, size_t *body_size, void **slot)
{
	struct http *http = context;
	struct http_answer answer = {.status = 200};
	if (strcmp(method, "GET") != 0 && strcmp(method, "HEAD") != 0)
		answer = (struct http_answer){405, PLAIN, memory_string("only GET and HEAD\n")};
	else if (!is_one_of(http->handler.open, url) && !is_for_us(http, connection))
		misdirected(&answer);
	else if (is_one_of(http->handler.paths, url))
		http->handler.answer(http->owner, url, &answer);
	else
		not_found(http, &answer);
	return send_answer(connection, &answer);
}

/* ---- on the loop ---- */

static void on_poll(uv_poll_t *poll, int status, int events);
static void on_wake(uv_timer_t *timer);

/* What was not used is saved up, but only so much. Returns how long to rest, in ms; 0: there is credit. */
static uint64_t charge(struct http *http, uint64_t begun, uint64_t ended)
{
	http->credit_us += (int64_t)((begun - http->credit_at) / 1000 / SHARE);
	if (http->credit_us > CREDIT_US)
		http->credit_us = CREDIT_US;
	int64_t cost_us = (int64_t)((ended - begun) / 1000);
	http->credit_us -= cost_us < COST_MOST_US ? cost_us : COST_MOST_US;
	http->credit_at = ended;
	return http->credit_us < 0 ? (uint64_t)-http->credit_us * SHARE / 1000 + 1 : 0;
}

/* When it has to run again although no socket moves; UINT64_MAX: never. */
static uint64_t next_wake(const struct http *http)
{
	const struct client *client = http->clients;
	uint64_t wait = UINT64_MAX, age;
	MHD_UNSIGNED_LONG_LONG due;
	if (client != NULL) {
		age = uv_now(http->loop) - client->since;
		wait = client->ended ? ENDING_MS : age < AGE_MOST_MS ? AGE_MOST_MS - age : 0;
	}
	if (MHD_get_timeout(http->daemon, &due) == MHD_YES && due < wait)
		wait = due;
	return wait;
}

static void serve(struct http *http)
{
	uint64_t begun = uv_hrtime();
	end_old_clients(http);
	MHD_run(http->daemon);
	uint64_t rest = charge(http, begun, uv_hrtime());
	uint64_t wait = rest > 0 ? rest : next_wake(http);
	if (rest > 0 && !http->resting)
		uv_poll_stop(&http->poll);
	else if (rest == 0 && http->resting)
		uv_poll_start(&http->poll, UV_READABLE, on_poll);
	http->resting = rest > 0;
	if (wait != UINT64_MAX)
		uv_timer_start(&http->wake, on_wake, wait, 0);
	else
		uv_timer_stop(&http->wake);
}

static void on_poll(uv_poll_t *poll, int status, int events)
{
	serve(container_of(poll, struct http, poll));
}

static void on_wake(uv_timer_t *timer)
{
	serve(container_of(timer, struct http, wake));
}

/* ---- starting and stopping ---- */

/* A listening socket, or -1 with errno set. */
static int listen_on(const char *address, int port)
{
	union {
		struct sockaddr any;
		struct sockaddr_in v4;
		struct sockaddr_in6 v6;
	} place = {0};
	bool v6 = strchr(address, ':') != NULL;
	int yes = 1;
	if ((v6 ? uv_ip6_addr(address, port, &place.v6) : uv_ip4_addr(address, port, &place.v4)) != 0) {
		errno = EADDRNOTAVAIL;
		return -1;
	}
	int fd = socket(v6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes); /* a restart meets its own old connections */
	if (bind(fd, &place.any, v6 ? sizeof place.v6 : sizeof place.v4) == 0 && listen(fd, BACKLOG) == 0)
		return fd;
	int error = errno;
	close(fd);
	errno = error;
	return -1;
}

static const char *bind_remedy(int error)
{
	switch (error) {
	case EADDRINUSE:
		return "; another process has it: give each its own http.listen";
	case EADDRNOTAVAIL:
		return "; this machine has no such address: 127.0.0.1 always exists";
	case EACCES:
		return "; ports below 1024 are reserved: choose a higher one in http.listen";
	case EAFNOSUPPORT:
		return "; this machine has no IPv6: use 127.0.0.1 in http.listen";
	default:
		return "";
	}
}

/* What the library complains about is mostly what clients do. */
__attribute__((format(printf, 2, 0))) static void on_log(void *context, const char *format, va_list arguments)
{
	char text[256];
	if (!log_enabled(LOG_LEVEL_DEBUG))
		return;
	vsnprintf(text, sizeof text, format, arguments);
	text[strcspn(text, "\n")] = '\0';
	log_debug("http", "libmicrohttpd: %s", text);
}

static void on_panic(void *context, const char *file, unsigned line, const char *reason)
{
	log_error("http", "libmicrohttpd gave up at %s:%u: %s; please report this", file, line,
	          reason != NULL ? reason : "no reason given");
	abort();
}

static struct MHD_Daemon *start_daemon(struct http *http, int fd)
{
	MHD_set_panic_func(on_panic, NULL);
	return MHD_start_daemon(MHD_USE_EPOLL | MHD_USE_ERROR_LOG, 0, NULL, NULL, on_request, http,
	                        MHD_OPTION_EXTERNAL_LOGGER, on_log, NULL, MHD_OPTION_LISTEN_SOCKET, fd,
	                        MHD_OPTION_CONNECTION_LIMIT, (unsigned)CLIENTS_HARD, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
	                        (size_t)REQUEST_BYTES, MHD_OPTION_NOTIFY_CONNECTION, on_connection, http,
	                        MHD_OPTION_END);
}

struct http *http_start(uv_loop_t *loop, const char *address, int port, const struct http_handler *handler, void *owner,
                        char *error, size_t error_size)
{
	bool v6 = strchr(address, ':') != NULL;
	int fd = listen_on(address, port);
	if (fd < 0) {
		snprintf(error, error_size, "http.listen: cannot listen on %s%s%s:%d: %s%s", v6 ? "[" : "", address,
		         v6 ? "]" : "", port, strerror(errno), bind_remedy(errno));
		return NULL;
	}
	struct http *http = memory_zeroed(1, sizeof *http);
	http->loop = loop;
	http->handler = *handler;
	http->owner = owner;
	http->credit_at = uv_hrtime();
	http->daemon = start_daemon(http, fd); /* which owns the socket now */
	if (http->daemon == NULL) {
		snprintf(error, error_size, "http.listen: libmicrohttpd does not start; is it built with epoll?");
		free(http);
		return NULL;
	}
	uv_timer_init(loop, &http->wake);
	uv_poll_init(loop, &http->poll, MHD_get_daemon_info(http->daemon, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd);
	uv_poll_start(&http->poll, UV_READABLE, on_poll);
	http->handles = 2;
	log_info("http", "http://%s%s%s:%d answers", v6 ? "[" : "", address, v6 ? "]" : "", port);
	return http;
}

static void handle_closed(uv_handle_t *handle)
{
	struct http *http = handle->data;
	if (--http->handles > 0)
		return;
	void (*stopped)(void *) = http->stopped;
	void *owner = http->owner;
	MHD_stop_daemon(http->daemon); /* ends the connections; only now that nobody polls its descriptor */
	free(http);
	stopped(owner);
}

void http_stop(struct http *http, void (*stopped)(void *owner))
{
	http->stopped = stopped;
	http->poll.data = http->wake.data = http;
	uv_close((uv_handle_t *)&http->poll, handle_closed);
	uv_close((uv_handle_t *)&http->wake, handle_closed);
}
