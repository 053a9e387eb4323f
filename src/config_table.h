/*
 * What the config*.c files share, and nobody else includes: the table of keys, the loader that collects values and
 * complaints, and the functions of each file.
 *
 *   config.c        the table; reads environment and flags; decides which value wins
 *   config_value.c  text with units -> typed value, checked against the table's range
 *   config_name.c   a key's spelling as flag and environment variable; the nearest known name
 *   config_file.c   JSON with comments -> (key, value, line)
 *   config_check.c  checks across keys, secret files, the state directory
 *   config_uri.c    checks and redaction of the MongoDB connection string
 *   config_print.c  --help, --man, --markdown, --version
 */
#ifndef MQTT2MONGO_CONFIG_TABLE_H
#define MQTT2MONGO_CONFIG_TABLE_H

#include "config.h"

#include <stddef.h>

enum config_type {
	CONFIG_TYPE_BOOLEAN,  /* bool */
	CONFIG_TYPE_INTEGER,  /* int */
	CONFIG_TYPE_COUNT,    /* int64_t */
	CONFIG_TYPE_DURATION, /* int64_t milliseconds, "500ms" */
	CONFIG_TYPE_SECONDS,  /* the same, but whole seconds */
	CONFIG_TYPE_SIZE,     /* int64_t bytes, "256MiB" */
	CONFIG_TYPE_RATE,     /* double per second, "20/s" or 20 */
	CONFIG_TYPE_SEED,     /* uint64_t, or "random" */
	CONFIG_TYPE_CHOICE,   /* one of config_entry.choices, as int */
	CONFIG_TYPE_TEXT,     /* char *, owned by struct config */
	CONFIG_TYPE_CONCERN,  /* the same, but a number is allowed too */
	CONFIG_TYPE_LIST, /* struct config_list: in the file an array of strings, or the default as a string; elsewhere
	                     the text of such an array, or its strings between commas */
};

struct config_choice {
	const char *name;
	int value;
};

/* What to do where several topic filters are wanted. */
#define CONFIG_ONE_FILTER                                                                                              \
	"there is one filter only; take one that matches all, or run a service with a state_dir of its own for each"

/* One key. Default and range are written as a user writes them: the same text is parsed, checked and printed. */
struct config_entry {
	const char *key;
	enum config_type type;
	bool secret;                         /* never shown; wiped from argv */
	const char *initial;                 /* NULL: none */
	const char *least, *most;            /* both or neither */
	const struct config_choice *choices; /* ends with a NULL name */
	size_t offset;                       /* in struct config */
	size_t set_offset;                   /* of the bool that says "set by the user"; 0: there is none */
	const char *initial_note;            /* what documentation says instead of `initial`, or NULL */
	const char *help;
	const char *once; /* why its flag is given once and what to do instead, or NULL: the last one counts */
};

extern const struct config_entry config_entries[];
extern const size_t config_entry_count;

/* Ascending: the later beats the earlier. */
enum config_source { CONFIG_SOURCE_DEFAULT, CONFIG_SOURCE_FILE, CONFIG_SOURCE_ENVIRONMENT, CONFIG_SOURCE_FLAG };

/* How a value was written: the file has types, environment and flags are plain text. */
enum config_kind {
	CONFIG_KIND_PLAIN,
	CONFIG_KIND_STRING,
	CONFIG_KIND_NUMBER,
	CONFIG_KIND_BOOLEAN,
	CONFIG_KIND_NULL,
	CONFIG_KIND_OBJECT,
	CONFIG_KIND_ARRAY,
};

/* Where the value in force came from. */
struct config_setting {
	enum config_source source;
	char *place; /* "a.json:12: mqtt.port", "--mqtt-port", …; NULL for a default */
};

/* What is to be said when everything is read. */
struct config_complaint {
	int kind;
	char *text; /* owned */
};

struct config_loader {
	struct config *config;
	struct config_setting *settings; /* one an entry, in the table's order */
	char **environment;
	FILE *output, *errors;
	struct config_complaint *complaints;
	size_t complaint_count;
	bool secret_in_file; /* config->file holds one, whether it counts or not */
	unsigned error_count;
	enum config_action action;
};

/* A parsed value; the member follows from the type. */
struct config_value {
	int64_t integer;
	double rate;
	uint64_t seed;
	bool yes;         /* booleans; for a seed: true unless "random" */
	const char *text; /* borrowed; for a list as config_list_parse() takes it */
};

/* One line on loader->errors when all is read, escaped there; an error makes the configuration invalid. */
void config_error(struct config_loader *loader, const char *format, ...) __attribute__((format(printf, 2, 3)));
void config_warning(struct config_loader *loader, const char *format, ...) __attribute__((format(printf, 2, 3)));
void config_note(struct config_loader *loader, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* config.c */
const struct config_entry *config_entry_find(const char *key);
/* Check a value and keep it unless a stronger source has set the key. */
void config_offer(struct config_loader *loader, enum config_source source, const struct config_entry *entry,
                  enum config_kind kind, const char *text, const char *place);
/* The user set this key, in whatever way. */
bool config_is_set(const struct config_loader *loader, const char *key);
/* Where the key was set, for messages; the key itself if it has its default. Never NULL. */
const char *config_place(const struct config_loader *loader, const char *key);
/* The value of a variable in loader->environment, or NULL. */
const char *config_environment(const struct config_loader *loader, const char *name);

/* config_value.c: NULL and `value` filled, or what is wrong, allocated. Secrets are never quoted in it. */
char *config_value_parse(const struct config_entry *entry, enum config_kind kind, const char *text,
                         struct config_value *value);
/* The texts of a list, of which config_list_finish() frees the memory. NULL, or what is wrong, allocated. */
char *config_list_parse(const char *text, struct config_list *list);
void config_list_finish(struct config_list *list);
/* The text in quotes, control characters escaped, long text cut, credentials of URLs hidden. Allocated. */
char *config_quote(const char *text);

/* config_name.c */
/* The key as it is spelled in that source: mqtt.tls.ca, MQTT2MONGO_MQTT_TLS_CA, --mqtt-tls-ca. Allocated. */
char *config_spell(enum config_source source, const char *key);
/* The entry spelled so, or NULL. */
const struct config_entry *config_entry_named(enum config_source source, const char *name, size_t length);
/* ", did you mean X?" or what else helps, spelled for that source. Allocated. */
char *config_suggest(enum config_source source, const char *name, size_t length);
/* True if some key starts with `name` and a dot. */
bool config_is_section(const char *name);

/* config_file.c: read config->file, offer each value, complain about the rest. */
void config_file_read(struct config_loader *loader);
/* A whole file, NUL-terminated and allocated, or NULL with errno set (EFBIG above `limit`). */
char *config_slurp(const char *path, size_t limit, size_t *length);

/* config_check.c: everything that concerns more than one value; resolves port, secrets and state directory. */
void config_check(struct config_loader *loader);
/* Warn of a file with a secret in it that others can read, or change. `what` goes on behind its name. */
void config_warn_if_readable(struct config_loader *loader, const char *place, const char *what, const char *path);
/* Nothing that is sent there leaves this machine. */
bool config_is_loopback(const char *host);

/* config_uri.c */
void config_check_uri(struct config_loader *loader);
/* The '@' that ends the credentials in a URI's text behind "://", or NULL: there are none. Who shows a URI or part of
 * one asks this function where they end. */
const char *config_credentials_end(const char *rest);
/* A MongoDB URI in which there is nothing to hide. */
bool config_uri_is_harmless(const char *uri);

/* config_print.c */
void config_print_help(FILE *output);
void config_print_man(FILE *output);
void config_print_markdown(FILE *output);
void config_print_version(FILE *output);

#endif
