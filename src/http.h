/*
 * A small HTTP server for whoever watches the service: libmicrohttpd on the loop, without a thread of its own. Knows
 * nothing of the service; the owner supplies the paths and the texts.
 *
 * Nobody who connects can disturb the loop. There are few connections at a time; for one more the oldest gives way, so
 * that idle ones keep nobody out. Each carries one request and ends after ten seconds at the latest, whatever its
 * client does. A request has at most 16 KiB and no body. Serving takes at most a tenth of the loop's time. Loop thread.
 */
#ifndef MQTT2MONGO_HTTP_H
#define MQTT2MONGO_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <uv.h>

struct http;

struct http_answer {
	int status; /* 200 unless set */
	const char *content_type;
	char *text; /* allocated; http frees it */
};

struct http_handler {
	const char *const *paths; /* what there is, each with its slash; ends with NULL. Borrowed */
	const char *const
	    *open; /* those of them that are answered whatever name is asked for; ends with NULL. Borrowed */
	const char *const *hosts; /* names to be known by, beside those of http_knows_host(). Borrowed */
	size_t host_count;
	/* A GET or HEAD of one of the paths. */
	void (*answer)(void *owner, const char *path, struct http_answer *answer);
};

/*
 * Is a request with this Host header for us? A page of a stranger can have its own name resolved to our address, and
 * then ask us in its visitor's browser ("DNS rebinding"); only the Host tells. Addresses are known, localhost and names
 * below it, names below local, and those of `hosts`; none at all (HTTP/1.0) too, for no browser leaves it out. Pure.
 */
bool http_knows_host(const char *host, const char *const *hosts, size_t host_count);

/* Listen. `address` is a literal IPv4 or IPv6 address. NULL with `error` filled when that is not possible; then nothing
 * is left on the loop. */
struct http *http_start(uv_loop_t *loop, const char *address, int port, const struct http_handler *handler, void *owner,
                        char *error, size_t error_size);

/* Listen no more, end every connection. `stopped` is called when everything is closed, and then the memory is gone. */
void http_stop(struct http *http, void (*stopped)(void *owner));

#endif
