/*
 * Configuration: one table in config.c (key, type, default, range, secret?, help) drives the file, the environment, the
 * flags, --help, the man page and the README's table. Flag beats environment beats file beats default.
 *
 * Loaded once at start-up on the main thread, before any other thread exists; read-only from then on, so any
 * thread may read it. The struct owns its strings.
 */
#ifndef MQTT2MONGO_CONFIG_H
#define MQTT2MONGO_CONFIG_H

#include "id.h"
#include "log.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

/* A set: CONFIG_ROLE_BOTH is publisher | consumer. */
enum config_role {
	CONFIG_ROLE_NONE = 0,
	CONFIG_ROLE_PUBLISHER = 1,
	CONFIG_ROLE_CONSUMER = 2,
	CONFIG_ROLE_BOTH = 3,
};

enum config_status { CONFIG_STATUS_AUTO, CONFIG_STATUS_ON, CONFIG_STATUS_OFF };

/* What the command line asks for. */
enum config_action {
	CONFIG_RUN,
	CONFIG_CHECK,        /* --check: lint, then try broker and database */
	CONFIG_DRY_RUN,      /* --dry-run: print documents, store and acknowledge nothing */
	CONFIG_SPOOL_STATUS, /* --spool-status: print how much the spool holds */
	CONFIG_SPOOL_EXPORT, /* --spool-export: print its messages */
	CONFIG_REPLAY,       /* --replay-dead-letters: store those dead letters that can be stored now */
	CONFIG_PRINTED,      /* --help, --version, …: already printed to standard output, exit 0 */
	CONFIG_INVALID,      /* already said on standard error, exit 2 */
};

struct config_tls {
	bool enabled;
	char *ca;      /* PEM file, or NULL: the system's CAs */
	char *cert;    /* PEM file, or NULL */
	char *key;     /* PEM file, or NULL */
	bool insecure; /* no host name check */
};

struct config_mqtt {
	char *host;
	int port;                  /* 1 to 65535 */
	char *username, *password; /* or NULL; password_file is already read into password */
	char *password_file;
	char *client_id;            /* NULL: made once, kept in the state directory */
	int protocol;               /* 5 or 4 (3.1.1) */
	int64_t keepalive_ms;       /* 5 s to 65535 s, whole seconds */
	int64_t connect_timeout_ms; /* resolve + connect + TLS + CONNACK */
	int64_t session_expiry_ms;  /* whole seconds; MQTT 5 only */
	int receive_maximum;        /* 1 to 65535; MQTT 5 only */
	bool watch_broker;          /* read $SYS/broker/… */
	struct config_tls tls;
	int64_t reconnect_min_ms, reconnect_max_ms;
};

struct config_mongodb {
	char *uri; /* uri_file is already read into it */
	char *uri_file;
	char *database;
	char *w; /* "majority", a number ≥ 1, or a tag set's name */
	bool j;
	int64_t write_timeout_ms;
	bool w_set, j_set,
	    write_timeout_set; /* set by the user: then the key beats the URI; else the URI beats the default */
};

/* A list of texts, owned. */
struct config_list {
	char **items;
	size_t count;
};

struct config_consumer {
	char *topic; /* filter */
	int qos;     /* 0 to 2; 2 is subscribed as 1 */
	char *collection, *dead_letter;
	struct config_list id_parts; /* as they were written */
	struct id_rule id;           /* made of them; zeroed: ObjectIds */
	int connections;             /* 1 to 64 */
	char *share;         /* name of the share group; NULL: the client id's with several connections, else none */
	int workers;         /* 1 to 64 */
	int64_t max_payload; /* bytes, up to 15 MiB */
	int64_t batch_count; /* messages */
	int64_t batch_bytes; /* topic + payload bytes */
	int64_t batch_interval_ms; /* from the start of one write of a connection to the next; 0: none */
	char *qos0_topic;          /* filter, or NULL */
	int64_t qos0_buffer;       /* bytes */
};

/* Does it use shared subscriptions? */
static inline bool config_shares(const struct config_consumer *consumer)
{
	return consumer->connections > 1 || consumer->share != NULL;
}

struct config_publisher {
	char *topic;   /* may hold {device} */
	double rate;   /* messages per second, 0.1 to 20000 */
	int64_t count; /* 0: endless */
	int qos;
	int64_t devices; /* 1 to 1,000,000 */
	bool seed_set;   /* false: random */
	uint64_t seed;
};

struct config_spool {
	char *path;        /* resolved: the file, in state_dir unless set */
	int64_t max_size;  /* bytes on disk; 0: no spool */
	bool max_size_set; /* false: min(1 GiB, a quarter of what is free), settled when the spool is opened */
	int64_t after_ms;  /* a batch MongoDB has not confirmed after this goes to the spool */
	int64_t linger_ms; /* wait this long for more messages before each commit */
};

struct config_http {
	char *listen;             /* "off", or ADDRESS:PORT as it is written */
	bool enabled;             /* the rest is set */
	char address[46];         /* a literal IPv4 or IPv6 address */
	int port;                 /* 1 to 65535 */
	struct config_list hosts; /* names that a request may ask for, beside addresses and names of this machine */
};

struct config {
	enum config_role role;
	struct config_mqtt mqtt;
	struct config_mongodb mongodb;
	struct config_consumer consumer;
	struct config_publisher publisher;
	struct config_spool spool;
	struct config_http http;
	char *state_dir; /* resolved; the directory may not exist yet */
	int64_t shutdown_timeout_ms;
	bool core_dumps;
	enum log_level log_level;
	enum log_format log_format;
	enum config_status log_status; /* the live status line: auto means on a terminal */
	char *file;                    /* -c FILE, or NULL */
	char *replay_filter;           /* --filter, a MongoDB query as extended JSON, or NULL: all dead letters */
};

/*
 * Fill `config` from the command line, `environment` (as environ) and the file.
 * Errors, warnings and notes are printed to `errors`, one line each in the form of log.format: what is wrong, where,
 * what is allowed, the nearest known name. Secrets found in argv are wiped from it (so /proc/PID/cmdline does not show
 * them) after a warning. Whatever is returned, config_finish() frees.
 */
enum config_action config_load(struct config *config, int argc, char **argv, char **environment, FILE *output,
                               FILE *errors);

/* Free everything, secrets wiped. A zeroed struct is allowed. */
void config_finish(struct config *config);

/* The URI with user name and password replaced by ***, allocated; also for text that is no valid URI. */
char *config_redact_uri(const char *uri);

#endif
