/*
 * Configuration: the table of keys, and the order in which sources are read. See config.h for the contract and
 * config_table.h for who does what in the other config_*.c files.
 *
 * The table says everything about a key: where it lies in struct config, how its text is parsed, its default and
 * range, and the words for --help, the man page and the README. Environment names and flags are derived from the key.
 *
 * Every source offers its values through config_offer(), which checks each of them, the losing ones too, so that all
 * mistakes are reported in one go; a value is kept when no stronger source has set the key before. The order of
 * reading therefore does not matter, and flags are read first because they name the file.
 *
 * Everything here runs on the main thread before there is another.
 */
#define _GNU_SOURCE
#include "config_table.h"

#include "escape.h"
#include "json.h"
#include "memory.h"

#include <bson/bson.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static const struct config_choice ROLES[] = {
    {"publisher", CONFIG_ROLE_PUBLISHER}, {"consumer", CONFIG_ROLE_CONSUMER}, {"both", CONFIG_ROLE_BOTH}, {NULL, 0}};
static const struct config_choice PROTOCOLS[] = {{"5", 5}, {"3.1.1", 4}, {NULL, 0}};
static const struct config_choice LEVELS[] = {{"debug", LOG_LEVEL_DEBUG},
                                              {"info", LOG_LEVEL_INFO},
                                              {"warn", LOG_LEVEL_WARN},
                                              {"error", LOG_LEVEL_ERROR},
                                              {NULL, 0}};
static const struct config_choice FORMATS[] = {{"text", LOG_FORMAT_TEXT}, {"json", LOG_FORMAT_JSON}, {NULL, 0}};
static const struct config_choice STATUSES[] = {
    {"auto", CONFIG_STATUS_AUTO}, {"on", CONFIG_STATUS_ON}, {"off", CONFIG_STATUS_OFF}, {NULL, 0}};

_Static_assert(sizeof(enum config_role) == sizeof(int) && sizeof(enum config_status) == sizeof(int) &&
                   sizeof(enum log_level) == sizeof(int) && sizeof(enum log_format) == sizeof(int),
               "choices are stored as int");

#define AT(member)  .offset = offsetof(struct config, member)
#define SET(member) .set_offset = offsetof(struct config, member)

/* clang-format off */
const struct config_entry config_entries[] = {
    {.key = "role", .type = CONFIG_TYPE_CHOICE, .choices = ROLES, AT(role),
     .initial_note = "required",
     .help = "what this process does: publish generated messages, consume messages into MongoDB, or both"},

    {.key = "mqtt.host", .type = CONFIG_TYPE_TEXT, .initial = "localhost", AT(mqtt.host),
     .help = "host name or address of the MQTT broker"},
    {.key = "mqtt.port", .type = CONFIG_TYPE_INTEGER, .initial = "1883", .least = "1", .most = "65535", AT(mqtt.port),
     .initial_note = "1883, or 8883 with TLS",
     .help = "TCP port of the broker"},
    {.key = "mqtt.username", .type = CONFIG_TYPE_TEXT, AT(mqtt.username),
     .help = "user name at the broker"},
    {.key = "mqtt.password", .type = CONFIG_TYPE_TEXT, .secret = true, AT(mqtt.password),
     .help = "password at the broker; better kept in mqtt.password_file"},
    {.key = "mqtt.password_file", .type = CONFIG_TYPE_TEXT, AT(mqtt.password_file),
     .help = "file that holds the password; one line feed at its end is ignored"},
    {.key = "mqtt.client_id", .type = CONFIG_TYPE_TEXT, AT(mqtt.client_id),
     .initial_note = "mqtt2mongo-…, made once and kept in state_dir",
     .help = "name of the session at the broker, unique there; two processes with the same one throw each other out"},
    {.key = "mqtt.protocol", .type = CONFIG_TYPE_CHOICE, .initial = "5", .choices = PROTOCOLS, AT(mqtt.protocol),
     .help = "MQTT version"},
    {.key = "mqtt.keepalive", .type = CONFIG_TYPE_SECONDS, .initial = "60s", .least = "5s", .most = "65535s",
     AT(mqtt.keepalive_ms),
     .help = "the longest silence before broker and service check that the other is still there"},
    {.key = "mqtt.connect_timeout", .type = CONFIG_TYPE_DURATION, .initial = "5s", .least = "100ms", .most = "10min",
     AT(mqtt.connect_timeout_ms),
     .help = "time for name resolution, TCP, TLS and the broker's answer together"},
    {.key = "mqtt.session_expiry", .type = CONFIG_TYPE_SECONDS, .initial = "7d", .least = "0s", .most = "49710d",
     AT(mqtt.session_expiry_ms),
     .help = "how long the broker keeps messages for this service while it is away (MQTT 5 only)"},
    {.key = "mqtt.receive_maximum", .type = CONFIG_TYPE_INTEGER, .initial = "800", .least = "1", .most = "65535",
     AT(mqtt.receive_maximum),
     .help = "messages the broker may send before the first is acknowledged, so the largest batch (MQTT 5 only)"},
    {.key = "mqtt.watch_broker", .type = CONFIG_TYPE_BOOLEAN, .initial = "true", AT(mqtt.watch_broker),
     .help = "read from $SYS what the broker drops, and warn of it; over a connection of its own, which takes 30 KiB of "
             "memory, 200 KiB with TLS"},
    {.key = "mqtt.tls.enabled", .type = CONFIG_TYPE_BOOLEAN, .initial = "false", AT(mqtt.tls.enabled),
     .help = "encrypt the connection to the broker"},
    {.key = "mqtt.tls.ca", .type = CONFIG_TYPE_TEXT, AT(mqtt.tls.ca),
     .initial_note = "the system's",
     .help = "PEM file with the certificate authorities that may have signed the broker's certificate"},
    {.key = "mqtt.tls.cert", .type = CONFIG_TYPE_TEXT, AT(mqtt.tls.cert),
     .help = "PEM file with this client's certificate; needs mqtt.tls.key"},
    {.key = "mqtt.tls.key", .type = CONFIG_TYPE_TEXT, AT(mqtt.tls.key),
     .help = "PEM file with the private key of mqtt.tls.cert, without a passphrase"},
    {.key = "mqtt.tls.insecure", .type = CONFIG_TYPE_BOOLEAN, .initial = "false", AT(mqtt.tls.insecure),
     .help = "do not check that the certificate names the broker's host; for tests only"},
    {.key = "mqtt.reconnect.min", .type = CONFIG_TYPE_DURATION, .initial = "1s", .least = "100ms", .most = "1h",
     AT(mqtt.reconnect_min_ms),
     .help = "wait before the first attempt to connect again; each further wait is about twice as long"},
    {.key = "mqtt.reconnect.max", .type = CONFIG_TYPE_DURATION, .initial = "30s", .least = "100ms", .most = "1h",
     AT(mqtt.reconnect_max_ms),
     .help = "the longest wait between two attempts to connect"},

    {.key = "mongodb.uri", .type = CONFIG_TYPE_TEXT, .initial = "mongodb://localhost:27017", .secret = true,
     AT(mongodb.uri),
     .help = "connection string; with a password in it, better kept in mongodb.uri_file"},
    {.key = "mongodb.uri_file", .type = CONFIG_TYPE_TEXT, AT(mongodb.uri_file),
     .help = "file that holds the connection string; one line feed at its end is ignored"},
    {.key = "mongodb.database", .type = CONFIG_TYPE_TEXT, .initial = "mqtt2mongo", AT(mongodb.database),
     .help = "database that documents are stored in"},
    {.key = "mongodb.write_concern.w", .type = CONFIG_TYPE_CONCERN, .initial = "majority", AT(mongodb.w),
     SET(mongodb.w_set),
     .help = "members that must have a document before its message is acknowledged: majority, a number from 1, or the "
             "name of a write concern of the replica set"},
    {.key = "mongodb.write_concern.j", .type = CONFIG_TYPE_BOOLEAN, .initial = "true", AT(mongodb.j),
     SET(mongodb.j_set),
     .help = "they must have it in their journal on disk"},
    {.key = "mongodb.write_concern.timeout", .type = CONFIG_TYPE_DURATION, .initial = "10s", .least = "100ms",
     .most = "10min", AT(mongodb.write_timeout_ms), SET(mongodb.write_timeout_set),
     .help = "how long a write may wait for them before it is tried again"},

    {.key = "consumer.topic", .type = CONFIG_TYPE_TEXT, .initial = "sensors/#", AT(consumer.topic),
     .once = CONFIG_ONE_FILTER,
     .help = "topic filter to subscribe to; + stands for one level, # at the end for all further ones"},
    {.key = "consumer.qos", .type = CONFIG_TYPE_INTEGER, .initial = "1", .least = "0", .most = "2", AT(consumer.qos),
     .help = "quality of service to subscribe with; 2 is subscribed as 1, 0 may lose messages"},
    {.key = "consumer.collection", .type = CONFIG_TYPE_TEXT, .initial = "messages", AT(consumer.collection),
     .help = "collection for messages"},
    {.key = "consumer.dead_letter", .type = CONFIG_TYPE_TEXT, .initial = "dead_letter", AT(consumer.dead_letter),
     .help = "collection for messages that are no JSON or that MongoDB refuses, byte for byte and with the reason"},
    {.key = "consumer.id", .type = CONFIG_TYPE_LIST, .initial = "objectid", AT(consumer.id_parts),
     .once = "give all its parts in one, between commas",
     .help = "what makes a document's _id: objectid, a new one for each delivery, or a list of parts of the message, of "
             "which each is topic, a JSON pointer into the payload as in /id, or user-property:NAME"},
    {.key = "consumer.connections", .type = CONFIG_TYPE_INTEGER, .initial = "1", .least = "1", .most = "64",
     AT(consumer.connections),
     .help = "connections to the broker that share the messages of consumer.topic, each with a session of its own"},
    {.key = "consumer.share", .type = CONFIG_TYPE_TEXT, AT(consumer.share),
     .initial_note = "the client id with several connections, else none",
     .help = "name of a share group: all connections of all services in it get each message once between them"},
    {.key = "consumer.workers", .type = CONFIG_TYPE_INTEGER, .initial = "2", .least = "1", .most = "64",
     AT(consumer.workers),
     .help = "threads that convert and store batches"},
    {.key = "consumer.max_payload", .type = CONFIG_TYPE_SIZE, .initial = "4MiB", .least = "1B", .most = "15MiB",
     AT(consumer.max_payload),
     .help = "the largest payload that is stored; of a larger one the start goes to the dead letters"},
    {.key = "consumer.batch.count", .type = CONFIG_TYPE_COUNT, .initial = "4096", .least = "1", .most = "65535",
     AT(consumer.batch_count),
     .help = "the most messages stored and acknowledged together"},
    {.key = "consumer.batch.bytes", .type = CONFIG_TYPE_SIZE, .initial = "8MiB", .least = "64KiB", .most = "256MiB",
     AT(consumer.batch_bytes),
     .initial_note = "8MiB, or consumer.max_payload if that is more",
     .help = "the most bytes of topics and payloads stored and acknowledged together"},
    {.key = "consumer.batch.interval", .type = CONFIG_TYPE_DURATION, .initial = "20ms", .least = "0s", .most = "10s",
     AT(consumer.batch_interval_ms),
     .help = "while messages keep coming, a connection's next write waits until so long after the start of its last "
             "one, so that more messages share it, or until waiting would save nothing; at QoS 1 up to an eighth of the "
             "keepalive. 0: each write is made at once"},
    {.key = "consumer.qos0_topic", .type = CONFIG_TYPE_TEXT, AT(consumer.qos0_topic), .once = CONFIG_ONE_FILTER,
     .help = "a second topic filter, subscribed at QoS 0 on a connection of its own, for messages that may be lost; no "
             "topic may match both filters"},
    {.key = "consumer.qos0_buffer", .type = CONFIG_TYPE_SIZE, .initial = "16MiB", .least = "64KiB", .most = "1GiB",
     AT(consumer.qos0_buffer),
     .help = "the most memory for such messages while they wait for MongoDB; what comes beyond it is dropped and counted"},

    {.key = "publisher.topic", .type = CONFIG_TYPE_TEXT, .initial = "sensors/{device}/readings", AT(publisher.topic),
     .help = "topic to publish to; {device} becomes the name of the device"},
    {.key = "publisher.rate", .type = CONFIG_TYPE_RATE, .initial = "1/s", .least = "0.1/s", .most = "20000/s",
     AT(publisher.rate),
     .help = "messages a second, all devices together"},
    {.key = "publisher.count", .type = CONFIG_TYPE_COUNT, .initial = "0", .least = "0", .most = "1000000000000000",
     AT(publisher.count), .initial_note = "0, endless",
     .help = "messages to publish in all"},
    {.key = "publisher.qos", .type = CONFIG_TYPE_INTEGER, .initial = "1", .least = "0", .most = "2",
     AT(publisher.qos),
     .help = "quality of service to publish with"},
    {.key = "publisher.devices", .type = CONFIG_TYPE_COUNT, .initial = "10", .least = "1", .most = "1000000",
     AT(publisher.devices),
     .help = "number of devices that are simulated"},
    {.key = "publisher.seed", .type = CONFIG_TYPE_SEED, .initial = "random", AT(publisher.seed),
     SET(publisher.seed_set),
     .help = "start of the random numbers; the same number gives the same messages"},

    {.key = "spool.path", .type = CONFIG_TYPE_TEXT, AT(spool.path),
     .initial_note = "spool.db in state_dir",
     .help = "file that keeps messages on disk while MongoDB does not take them"},
    {.key = "spool.max_size", .type = CONFIG_TYPE_SIZE, .initial = "1GiB", .least = "0B", .most = "16384GiB",
     AT(spool.max_size), SET(spool.max_size_set),
     .initial_note = "1GiB, or a quarter of the free disk space if that is less",
     .help = "the most disk space the spool takes; when it is full nothing more is acknowledged. 0: no spool, what MongoDB "
             "does not take goes back to the broker"},
    {.key = "spool.after", .type = CONFIG_TYPE_DURATION, .initial = "250ms", .least = "10ms", .most = "10min",
     AT(spool.after_ms),
     .help = "a batch that MongoDB has not confirmed after this time goes to the spool and is acknowledged"},
    {.key = "spool.linger", .type = CONFIG_TYPE_DURATION, .initial = "0s", .least = "0s", .most = "10s",
     AT(spool.linger_ms),
     .help = "while MongoDB is away: consumer.batch.interval for writes to the spool, where that is more; spares flash "
             "memory"},

    {.key = "http.listen", .type = CONFIG_TYPE_TEXT, .initial = "off", AT(http.listen),
     .help = "address and port for /metrics, /healthz, /readyz and /status.json, as in 127.0.0.1:9641; there is no password"},
    {.key = "http.hosts", .type = CONFIG_TYPE_LIST, AT(http.hosts),
     .initial_note = "addresses, localhost, *.localhost, *.local",
     .once = "give all names in one, between commas",
     .help = "further names that http.listen may be asked by for what is not /metrics, /healthz or /readyz; any other is "
             "refused, so that no page of a stranger can read it through a browser"},

    {.key = "state_dir", .type = CONFIG_TYPE_TEXT, AT(state_dir),
     .initial_note = "$STATE_DIRECTORY, /var/lib/mqtt2mongo if writable, or ~/.local/state/mqtt2mongo",
     .help = "directory for what must survive a restart"},
    {.key = "shutdown_timeout", .type = CONFIG_TYPE_DURATION, .initial = "10s", .least = "0s", .most = "1h",
     AT(shutdown_timeout_ms),
     .help = "time to store what is on its way after SIGTERM; the rest stays at the broker and comes again"},
    {.key = "core_dumps", .type = CONFIG_TYPE_BOOLEAN, .initial = "false", AT(core_dumps),
     .help = "a crash may leave a core dump, which holds passwords and messages, and debuggers may attach; to find a fault "
             "only"},

    {.key = "log.level", .type = CONFIG_TYPE_CHOICE, .initial = "info", .choices = LEVELS, AT(log_level),
     .help = "the least important lines to write"},
    {.key = "log.format", .type = CONFIG_TYPE_CHOICE, .initial = "text", .choices = FORMATS, AT(log_format),
     .help = "lines for people, or one JSON object a line"},
    {.key = "log.status", .type = CONFIG_TYPE_CHOICE, .initial = "auto", .choices = STATUSES, AT(log_status),
     .help = "live status line; auto: on a terminal"},
};
/* clang-format on */
const size_t config_entry_count = sizeof config_entries / sizeof config_entries[0];

/* How a complaint is printed: as text behind its word, or as a line of the log. */
enum { COMPLAINT_ERROR, COMPLAINT_WARNING, COMPLAINT_NOTE, COMPLAINT_EXAMPLE };

__attribute__((format(printf, 3, 0))) static void keep_complaint(struct config_loader *loader, int kind,
                                                                 const char *format, va_list arguments)
{
	char *text = NULL;
	if (vasprintf(&text, format, arguments) < 0)
		text = memory_string(format);
	loader->complaints =
	    memory_resize(loader->complaints, (loader->complaint_count + 1) * sizeof *loader->complaints);
	loader->complaints[loader->complaint_count++] = (struct config_complaint){kind, text};
}

void config_error(struct config_loader *loader, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	keep_complaint(loader, COMPLAINT_ERROR, format, arguments);
	va_end(arguments);
	loader->error_count++;
}

void config_warning(struct config_loader *loader, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	keep_complaint(loader, COMPLAINT_WARNING, format, arguments);
	va_end(arguments);
}

void config_note(struct config_loader *loader, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	keep_complaint(loader, COMPLAINT_NOTE, format, arguments);
	va_end(arguments);
}

/* For who reads the error before it: a command to try. */
__attribute__((format(printf, 2, 3))) static void example(struct config_loader *loader, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	keep_complaint(loader, COMPLAINT_EXAMPLE, format, arguments);
	va_end(arguments);
}

/* Only now is log.format known, which these lines follow as well. */
static void print_complaints(struct config_loader *loader)
{
	static const char *const words[] = {"error: ", "warning: ", "note: ", "  "};
	static const enum log_level levels[] = {LOG_LEVEL_ERROR, LOG_LEVEL_WARN, LOG_LEVEL_INFO};
	bool json = loader->config->log_format == LOG_FORMAT_JSON;
	for (size_t i = 0; i < loader->complaint_count; i++) {
		struct config_complaint *complaint = &loader->complaints[i];
		if (!json)
			escape_print(loader->errors, "%s%s", words[complaint->kind], complaint->text);
		else if (complaint->kind != COMPLAINT_EXAMPLE)
			log_print(loader->errors, LOG_FORMAT_JSON, levels[complaint->kind], "config", complaint->text);
		free(complaint->text);
	}
	free(loader->complaints);
}

const struct config_entry *config_entry_find(const char *key)
{
	for (size_t i = 0; i < config_entry_count; i++)
		if (strcmp(config_entries[i].key, key) == 0)
			return &config_entries[i];
	return NULL;
}

static const struct config_setting *find_setting(const struct config_loader *loader, const char *key)
{
	return &loader->settings[config_entry_find(key) - config_entries];
}

bool config_is_set(const struct config_loader *loader, const char *key)
{
	return find_setting(loader, key)->source != CONFIG_SOURCE_DEFAULT;
}

const char *config_place(const struct config_loader *loader, const char *key)
{
	const char *place = find_setting(loader, key)->place;
	return place != NULL ? place : key;
}

const char *config_environment(const struct config_loader *loader, const char *name)
{
	size_t length = strlen(name);
	for (char **variable = loader->environment; variable != NULL && *variable != NULL; variable++)
		if (strncmp(*variable, name, length) == 0 && (*variable)[length] == '=')
			return *variable + length + 1;
	return NULL;
}

static bool is_text(const struct config_entry *entry)
{
	return entry->type == CONFIG_TYPE_TEXT || entry->type == CONFIG_TYPE_CONCERN;
}

static void store(struct config *config, const struct config_entry *entry, const struct config_value *value)
{
	void *place = (char *)config + entry->offset;
	switch (entry->type) {
	case CONFIG_TYPE_BOOLEAN:
		*(bool *)place = value->yes;
		break;
	case CONFIG_TYPE_INTEGER:
	case CONFIG_TYPE_CHOICE:
		*(int *)place = (int)value->integer;
		break;
	case CONFIG_TYPE_COUNT:
	case CONFIG_TYPE_DURATION:
	case CONFIG_TYPE_SECONDS:
	case CONFIG_TYPE_SIZE:
		*(int64_t *)place = value->integer;
		break;
	case CONFIG_TYPE_RATE:
		*(double *)place = value->rate;
		break;
	case CONFIG_TYPE_SEED:
		*(uint64_t *)place = value->seed;
		break;
	case CONFIG_TYPE_TEXT:
	case CONFIG_TYPE_CONCERN:
		memory_wipe_free(*(char **)place);
		*(char **)place = memory_string(value->text);
		break;
	case CONFIG_TYPE_LIST:
		config_list_finish(place);
		free(config_list_parse(value->text, place)); /* it was checked */
		break;
	}
	if (entry->set_offset != 0)
		*((bool *)((char *)config + entry->set_offset)) = entry->type != CONFIG_TYPE_SEED || value->yes;
}

void config_offer(struct config_loader *loader, enum config_source source, const struct config_entry *entry,
                  enum config_kind kind, const char *text, const char *place)
{
	struct config_value value;
	struct config_setting *setting = &loader->settings[entry - config_entries];
	char *error = config_value_parse(entry, kind, text, &value);
	loader->secret_in_file |= source == CONFIG_SOURCE_FILE && entry->secret && !config_uri_is_harmless(text);
	if (error != NULL)
		config_error(loader, "%s: %s", place, error);
	else if (source >= setting->source)
		store(loader->config, entry, &value);
	if (source >= setting->source) {
		setting->source = source;
		free(setting->place);
		setting->place = memory_string(place);
	}
	free(error);
}

/* The defaults straight from the table; they count as not set. */
static void apply_defaults(struct config *config)
{
	for (size_t i = 0; i < config_entry_count; i++) {
		const struct config_entry *entry = &config_entries[i];
		struct config_value value;
		if (entry->initial == NULL)
			continue;
		free(config_value_parse(entry, CONFIG_KIND_PLAIN, entry->initial, &value));
		store(config, entry, &value);
		if (entry->set_offset != 0)
			*((bool *)((char *)config + entry->set_offset)) = false;
	}
}

static void read_environment(struct config_loader *loader)
{
	static const char prefix[] = "MQTT2MONGO_";
	for (char **variable = loader->environment; variable != NULL && *variable != NULL; variable++) {
		size_t length = strcspn(*variable, "=");
		if (strncmp(*variable, prefix, sizeof prefix - 1) != 0 || (*variable)[length] != '=')
			continue;
		const struct config_entry *entry = config_entry_named(CONFIG_SOURCE_ENVIRONMENT, *variable, length);
		char *name = strndup(*variable, length);
		char *hint = config_suggest(CONFIG_SOURCE_ENVIRONMENT, *variable, length);
		if (entry != NULL)
			config_offer(loader, CONFIG_SOURCE_ENVIRONMENT, entry, CONFIG_KIND_PLAIN,
			             *variable + length + 1, name);
		else
			config_warning(loader, "environment variable %s has no effect%s", name, hint);
		free(name);
		free(hint);
	}
}

/* The arguments and where reading stands. */
struct arguments {
	int count, next;
	char **values;
};

/* The flag's value: behind '=', or the next argument unless that looks like a flag. NULL: there is none. */
static char *take_value(struct arguments *arguments, char *behind_name)
{
	if (*behind_name == '=')
		return behind_name + 1;
	if (arguments->next >= arguments->count || strncmp(arguments->values[arguments->next], "--", 2) == 0)
		return NULL;
	return arguments->values[arguments->next++];
}

/* As take_value(), but a boolean may stand alone and then is true. */
static const char *take_boolean(struct arguments *arguments, const char *behind_name)
{
	if (*behind_name == '=')
		return behind_name + 1;
	const char *next = arguments->next < arguments->count ? arguments->values[arguments->next] : "";
	if (strcmp(next, "true") != 0 && strcmp(next, "false") != 0)
		return "true";
	arguments->next++;
	return next;
}

/* Say that other users could have seen the secret, and keep it from those who look later. */
static void wipe_argument(struct config_loader *loader, const struct config_entry *entry, char *secret)
{
	if (!config_uri_is_harmless(secret)) {
		char *file = memory_format("%s_file", entry->key), *flag = config_spell(CONFIG_SOURCE_FLAG, file);
		config_warning(loader,
		               "%s: a secret on the command line can be seen by other users, write it to a "
		               "file and give %s",
		               config_place(loader, entry->key), flag);
		free(flag);
		free(file);
	}
	memset(secret, 'x', strlen(secret));
}

static void read_key_flag(struct config_loader *loader, struct arguments *arguments, const struct config_entry *entry,
                          char *behind_name)
{
	char *flag = config_spell(CONFIG_SOURCE_FLAG, entry->key), *value = NULL;
	if (entry->once != NULL && loader->settings[entry - config_entries].source == CONFIG_SOURCE_FLAG)
		config_error(loader, "%s: is given twice, %s", flag, entry->once);
	if (entry->type == CONFIG_TYPE_BOOLEAN) {
		config_offer(loader, CONFIG_SOURCE_FLAG, entry, CONFIG_KIND_PLAIN, take_boolean(arguments, behind_name),
		             flag);
	} else if ((value = take_value(arguments, behind_name)) == NULL) {
		config_error(loader, "%s needs a value, as in %s=VALUE", flag, flag);
	} else {
		config_offer(loader, CONFIG_SOURCE_FLAG, entry, CONFIG_KIND_PLAIN, value, flag);
		if (entry->secret)
			wipe_argument(loader, entry, value);
	}
	free(flag);
}

static void read_file_flag(struct config_loader *loader, struct arguments *arguments, char *behind_name)
{
	const char *path = take_value(arguments, behind_name);
	if (path == NULL || *path == '\0')
		config_error(loader, "-c needs a file, as in -c mqtt2mongo.json");
	else if (loader->config->file != NULL)
		config_error(loader, "-c is given twice, only one file is read");
	else
		loader->config->file = memory_string(path);
}

static void read_action(struct config_loader *loader, enum config_action action)
{
	if (loader->action != CONFIG_RUN && loader->action != action)
		config_error(
		    loader, "--check, --dry-run, --spool-status, --spool-export and --replay-dead-letters exclude each "
			    "other, give one of them");
	loader->action = action;
}

/* Strict JSON first, which says where it goes wrong; then what MongoDB's extended JSON makes of it. */
static char *filter_fault(const char *text)
{
	struct buffer discarded = {0};
	struct json_fault fault;
	size_t length = strlen(text);
	enum json_code code = json_to_bson(text, length, "", length * 8 + 64, &discarded, &fault);
	buffer_finish(&discarded);
	if (code != JSON_OK)
		return memory_format("no JSON: %s at byte %zu", fault.message, fault.offset);
	if (text[strspn(text, " \t\r\n")] != '{')
		return memory_string("a query is an object, as in {\"reason.code\": \"unique_index\"}");
	bson_error_t error;
	bson_t *filter = bson_new_from_json((const uint8_t *)text, (ssize_t)length, &error);
	bson_destroy(filter);
	return filter == NULL ? memory_format("no extended JSON: %s", error.message) : NULL;
}

static void read_filter(struct config_loader *loader, struct arguments *arguments, char *behind_name)
{
	const char *text = take_value(arguments, behind_name);
	char *fault = text == NULL ? memory_string("needs a query, as in --filter='{\"topic\": \"sensors/a\"}'")
	              : loader->config->replay_filter != NULL ? memory_string("is given twice")
	                                                      : filter_fault(text);
	if (fault != NULL)
		config_error(loader, "--filter: %s", fault);
	else
		loader->config->replay_filter = memory_string(text);
	free(fault);
}

/* Complain without quoting what may be a secret: a value behind an unknown flag is neither shown nor taken as a flag.
 */
static void unknown_argument(struct config_loader *loader, struct arguments *arguments, char *argument, size_t length)
{
	if (argument[0] != '-') {
		config_error(loader, "argument %d belongs to no flag; a value with spaces needs quotes",
		             arguments->next - 1);
		return;
	}
	char *hint = config_suggest(CONFIG_SOURCE_FLAG, argument, length), *name = strndup(argument, length);
	char *shown = config_quote(name);
	config_error(loader, "unknown flag %.*s%s", (int)strlen(shown) - 2, shown + 1, hint);
	free(shown);
	free(name);
	free(hint);
	if (argument[length] != '=' && arguments->next < arguments->count &&
	    arguments->values[arguments->next][0] != '-')
		arguments->next++;
}

static void read_argument(struct config_loader *loader, struct arguments *arguments)
{
	char *argument = arguments->values[arguments->next++];
	size_t length = strcspn(argument, "=");
	const struct config_entry *entry = config_entry_named(CONFIG_SOURCE_FLAG, argument, length);
	if (entry != NULL)
		read_key_flag(loader, arguments, entry, argument + length);
	else if (strcmp(argument, "-c") == 0 || strncmp(argument, "--config", length > 8 ? length : 8) == 0)
		read_file_flag(loader, arguments, argument + length);
	else if (strcmp(argument, "--check") == 0)
		read_action(loader, CONFIG_CHECK);
	else if (strcmp(argument, "--dry-run") == 0)
		read_action(loader, CONFIG_DRY_RUN);
	else if (strcmp(argument, "--spool-status") == 0)
		read_action(loader, CONFIG_SPOOL_STATUS);
	else if (strcmp(argument, "--spool-export") == 0)
		read_action(loader, CONFIG_SPOOL_EXPORT);
	else if (strcmp(argument, "--replay-dead-letters") == 0)
		read_action(loader, CONFIG_REPLAY);
	else if (length == strlen("--filter") && strncmp(argument, "--filter", length) == 0)
		read_filter(loader, arguments, argument + length);
	else
		unknown_argument(loader, arguments, argument, length);
}

/* The flags that print something and end: they work beside anything, even mistakes. */
static bool print_and_end(struct config_loader *loader, int argc, char **argv)
{
	static const struct {
		const char *flag;
		void (*print)(FILE *output);
	} PRINTERS[] = {{"--help", config_print_help},
	                {"-h", config_print_help},
	                {"--version", config_print_version},
	                {"--man", config_print_man},
	                {"--markdown", config_print_markdown}};
	for (int i = 1; i < argc; i++)
		for (size_t j = 0; j < sizeof PRINTERS / sizeof PRINTERS[0]; j++)
			if (strcmp(argv[i], PRINTERS[j].flag) == 0) {
				PRINTERS[j].print(loader->output);
				return true;
			}
	return false;
}

/* What the action implies when no role is given: a check looks at both sides, the others consume. */
static void settle_role(struct config_loader *loader)
{
	struct config *config = loader->config;
	if (loader->action == CONFIG_CHECK && config->role == CONFIG_ROLE_NONE)
		config->role = CONFIG_ROLE_BOTH;
	if (config->replay_filter != NULL && loader->action != CONFIG_REPLAY)
		config_error(loader, "--filter says which dead letters to replay, it needs --replay-dead-letters");
	if (loader->action != CONFIG_DRY_RUN && loader->action != CONFIG_REPLAY)
		return;
	if (config->role == CONFIG_ROLE_PUBLISHER)
		config_error(loader, "%s: %s, the role must be consumer", config_place(loader, "role"),
		             loader->action == CONFIG_REPLAY
		                 ? "--replay-dead-letters stores what the consumer could not"
		                 : "--dry-run shows what the consumer would store");
	config->role = CONFIG_ROLE_CONSUMER;
}

static void require_role(struct config_loader *loader)
{
	if (loader->config->role != CONFIG_ROLE_NONE || config_is_set(loader, "role"))
		return;
	if (loader->action == CONFIG_SPOOL_STATUS || loader->action == CONFIG_SPOOL_EXPORT)
		return;
	config_error(loader, "no role is given, say what this process shall do, for example one of:");
	example(loader, "mqtt2mongo --role publisher --mqtt-host localhost");
	example(loader, "mqtt2mongo --role consumer --mqtt-host localhost --mongodb-uri mongodb://localhost:27017");
	example(loader, "mqtt2mongo --role both");
}

static void load(struct config_loader *loader, int argc, char **argv)
{
	struct arguments arguments = {.count = argc, .next = 1, .values = argv};
	apply_defaults(loader->config);
	while (arguments.next < arguments.count)
		read_argument(loader, &arguments);
	read_environment(loader);
	if (loader->config->file != NULL)
		config_file_read(loader);
	settle_role(loader);
	config_check(loader);
	require_role(loader);
}

enum config_action config_load(struct config *config, int argc, char **argv, char **environment, FILE *output,
                               FILE *errors)
{
	struct config_loader loader = {
	    .config = config, .environment = environment, .output = output, .errors = errors, .action = CONFIG_RUN};
	*config = (struct config){0};
	if (print_and_end(&loader, argc, argv))
		return CONFIG_PRINTED;
	loader.settings = memory_zeroed(config_entry_count, sizeof *loader.settings);
	load(&loader, argc, argv);
	print_complaints(&loader);
	for (size_t i = 0; i < config_entry_count; i++)
		free(loader.settings[i].place);
	free(loader.settings);
	return loader.error_count == 0 ? loader.action : CONFIG_INVALID;
}

void config_finish(struct config *config)
{
	for (size_t i = 0; i < config_entry_count; i++) {
		void *place = (char *)config + config_entries[i].offset;
		if (is_text(&config_entries[i]))
			memory_wipe_free(*(char **)place);
		else if (config_entries[i].type == CONFIG_TYPE_LIST)
			config_list_finish(place);
	}
	id_rule_finish(&config->consumer.id);
	free(config->file);
	free(config->replay_filter);
	*config = (struct config){0};
}
