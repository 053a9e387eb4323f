/*
 * One key, three spellings (mqtt.tls.ca, MQTT2MONGO_MQTT_TLS_CA, --mqtt-tls-ca), and the known name nearest to one
 * that does not exist: first what people commonly call it, then the same last word in another section, then the
 * smallest edit distance. Pure.
 */
#define _GNU_SOURCE
#include "config_table.h"

#include "memory.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_SIZE = 64 };

static const char PREFIX[] = "MQTT2MONGO_";

/* Flags that are no keys. */
static const char *const PLAIN_FLAGS[] = {"config", "check", "dry-run", "replay-dead-letters", "filter", "version",
                                          "help",   "man",   "markdown"};

/* Other tools' words for our keys, without the section; '_' for every separator. */
static const struct {
	const char *word, *key;
} SYNONYMS[] = {
    {"broker", "mqtt.host"},
    {"server", "mqtt.host"},
    {"hostname", "mqtt.host"},
    {"address", "mqtt.host"},
    {"url", "mqtt.host"},
    {"user", "mqtt.username"},
    {"login", "mqtt.username"},
    {"pass", "mqtt.password"},
    {"passwd", "mqtt.password"},
    {"clientid", "mqtt.client_id"},
    {"id", "mqtt.client_id"},
    {"version", "mqtt.protocol"},
    {"protocol_version", "mqtt.protocol"},
    {"keep_alive", "mqtt.keepalive"},
    {"session_expiry_interval", "mqtt.session_expiry"},
    {"max_inflight", "mqtt.receive_maximum"},
    {"inflight", "mqtt.receive_maximum"},
    {"tls", "mqtt.tls.enabled"},
    {"ssl", "mqtt.tls.enabled"},
    {"cafile", "mqtt.tls.ca"},
    {"ca_file", "mqtt.tls.ca"},
    {"ca_cert", "mqtt.tls.ca"},
    {"certfile", "mqtt.tls.cert"},
    {"cert_file", "mqtt.tls.cert"},
    {"keyfile", "mqtt.tls.key"},
    {"key_file", "mqtt.tls.key"},
    {"mongo_uri", "mongodb.uri"},
    {"mongo_url", "mongodb.uri"},
    {"mongodb_url", "mongodb.uri"},
    {"mongo", "mongodb.uri"},
    {"mongodb", "mongodb.uri"},
    {"mongodb_server", "mongodb.uri"},
    {"mongodb_host", "mongodb.uri"},
    {"mongo_host", "mongodb.uri"},
    {"mongodb_port", "mongodb.uri"},
    {"mongo_port", "mongodb.uri"},
    {"mongodb_username", "mongodb.uri"},
    {"mongodb_user", "mongodb.uri"},
    {"mongodb_password", "mongodb.uri"},
    {"database_url", "mongodb.uri"},
    {"connection_string", "mongodb.uri"},
    {"database_name", "mongodb.database"},
    {"db_name", "mongodb.database"},
    {"dbname", "mongodb.database"},
    {"db", "mongodb.database"},
    {"journal", "mongodb.write_concern.j"},
    {"wtimeout", "mongodb.write_concern.timeout"},
    {"write_concern", "mongodb.write_concern.w"},
    {"collection_name", "consumer.collection"},
    {"deadletter", "consumer.dead_letter"},
    {"filter", "consumer.topic"},
    {"threads", "consumer.workers"},
    {"max_size", "consumer.max_payload"},
    {"batch_size", "consumer.batch.count"},
    {"interval", "publisher.rate"},
    {"publish_interval", "publisher.rate"},
    {"messages", "publisher.count"},
    {"data_dir", "state_dir"},
    {"mode", "role"},
    {"debug", "log.level"},
    {"verbose", "log.level"},
    {"loglevel", "log.level"},
};

static const char *const SECTIONS[] = {"mqtt_", "mongodb_", "mongo_", "consumer_", "publisher_", "log_"};

char *config_spell(enum config_source source, const char *key)
{
	bool variable = source == CONFIG_SOURCE_ENVIRONMENT, flag = source == CONFIG_SOURCE_FLAG;
	char *name = memory_format("%s%s", variable ? PREFIX : flag ? "--" : "", key);
	for (char *at = name; *at != '\0'; at++) {
		if (variable)
			*at = (char)(*at == '.' ? '_' : toupper((unsigned char)*at));
		else if (flag && (*at == '.' || *at == '_'))
			*at = '-';
	}
	return name;
}

const struct config_entry *config_entry_named(enum config_source source, const char *name, size_t length)
{
	for (size_t i = 0; i < config_entry_count; i++) {
		char *spelled = config_spell(source, config_entries[i].key);
		bool same = strlen(spelled) == length && strncmp(spelled, name, length) == 0;
		free(spelled);
		if (same)
			return &config_entries[i];
	}
	return NULL;
}

bool config_is_section(const char *name)
{
	size_t length = strlen(name);
	for (size_t i = 0; i < config_entry_count; i++)
		if (strncmp(config_entries[i].key, name, length) == 0 && config_entries[i].key[length] == '.')
			return true;
	return false;
}

/* Lower case, '_' for every separator, without our prefix and leading dashes: what names are compared as. */
static void normalise(const char *name, size_t length, char normal[NAME_SIZE])
{
	size_t used = 0;
	for (size_t i = 0; i < length && used < NAME_SIZE - 1; i++) {
		char c = (char)tolower((unsigned char)name[i]);
		if (c == '-' || c == '.')
			c = '_';
		if (used != 0 || c != '_')
			normal[used++] = c;
	}
	normal[used] = '\0';
	if (strncasecmp(normal, PREFIX, sizeof PREFIX - 1) == 0)
		memmove(normal, normal + sizeof PREFIX - 1, used + 1 - (sizeof PREFIX - 1));
}

static const char *without_section(const char *normal)
{
	for (size_t i = 0; i < sizeof SECTIONS / sizeof SECTIONS[0]; i++)
		if (strncmp(normal, SECTIONS[i], strlen(SECTIONS[i])) == 0)
			return normal + strlen(SECTIONS[i]);
	return normal;
}

static const char *find_synonym(const char *normal)
{
	for (size_t i = 0; i < sizeof SYNONYMS / sizeof SYNONYMS[0]; i++)
		if (strcmp(SYNONYMS[i].word, normal) == 0)
			return SYNONYMS[i].key;
	return NULL;
}

/* `word` is the key without its first section, or its last word alone. */
static bool ends_in(const char *key, const char *word)
{
	const char *const tails[] = {strchr(key, '.'), strrchr(key, '.')};
	char tail[NAME_SIZE];
	for (size_t i = 0; i < 2; i++) {
		if (tails[i] == NULL)
			continue;
		normalise(tails[i], strlen(tails[i]), tail);
		if (strcmp(tail, word) == 0)
			return true;
	}
	return false;
}

/* The next key from *at on that is `normal` but for its sections, or NULL. Moves *at behind it. */
static const char *find_last_word(const char *normal, size_t *at)
{
	const char *word = without_section(normal);
	while (*at < config_entry_count) {
		const char *key = config_entries[(*at)++].key;
		if (ends_in(key, word))
			return key;
	}
	return NULL;
}

/* Levenshtein's distance of two names of at most NAME_SIZE - 1 characters. */
static unsigned distance(const char *a, const char *b)
{
	unsigned row[NAME_SIZE];
	size_t length = strlen(b);
	for (size_t j = 0; j <= length; j++)
		row[j] = (unsigned)j;
	for (size_t i = 0; a[i] != '\0'; i++) {
		unsigned diagonal = row[0];
		row[0] = (unsigned)i + 1;
		for (size_t j = 0; j < length; j++) {
			unsigned best = diagonal + (a[i] != b[j]);
			best = row[j] + 1 < best ? row[j] + 1 : best;
			best = row[j + 1] + 1 < best ? row[j + 1] + 1 : best;
			diagonal = row[j + 1];
			row[j + 1] = best;
		}
	}
	return row[length];
}

struct nearest {
	char name[NAME_SIZE];
	unsigned distance;
};

static void consider(struct nearest *nearest, const char *normal, const char *candidate, size_t length)
{
	char other[NAME_SIZE];
	normalise(candidate, length, other);
	unsigned apart = distance(normal, other);
	if (apart >= nearest->distance)
		return;
	nearest->distance = apart;
	snprintf(nearest->name, sizeof nearest->name, "%.*s", (int)length, candidate);
}

/* Sections of as many words as `depth` dots join: in a file, they are misspelled too. */
static void consider_sections(struct nearest *nearest, const char *normal, const char *key, unsigned depth)
{
	for (const char *dot = strchr(key, '.'); dot != NULL; dot = strchr(dot + 1, '.'))
		if (depth-- == 0)
			consider(nearest, normal, key, (size_t)(dot - key));
}

static unsigned count_dots(const char *name, size_t length)
{
	unsigned dots = 0;
	for (size_t i = 0; i < length; i++)
		dots += name[i] == '.';
	return dots;
}

/* The candidate with the least edits, if two of them or those of a third of the name suffice. */
static struct nearest find_nearest(enum config_source source, const char *name, size_t length, const char *normal)
{
	unsigned third = (unsigned)strlen(normal) / 3;
	struct nearest nearest = {.distance = third > 2 ? third + 1 : third > 0 ? 3 : 2};
	for (size_t i = 0; i < config_entry_count; i++) {
		const char *key = config_entries[i].key;
		consider(&nearest, normal, key, strlen(key));
		if (source == CONFIG_SOURCE_FILE)
			consider_sections(&nearest, normal, key, count_dots(name, length));
	}
	for (size_t i = 0; i < sizeof PLAIN_FLAGS / sizeof PLAIN_FLAGS[0] && source == CONFIG_SOURCE_FLAG; i++)
		consider(&nearest, normal, PLAIN_FLAGS[i], strlen(PLAIN_FLAGS[i]));
	return nearest;
}

static char *did_you_mean(enum config_source source, const char *key, const char *other)
{
	char *first = config_spell(source, key);
	char *second = other != NULL ? config_spell(source, other) : NULL;
	char *text =
	    memory_format(", did you mean %s%s%s?", first, second != NULL ? " or " : "", second != NULL ? second : "");
	free(first);
	free(second);
	return text;
}

char *config_suggest(enum config_source source, const char *name, size_t length)
{
	char normal[NAME_SIZE];
	size_t at = 0;
	normalise(name, length, normal);
	const char *synonym = find_synonym(normal);
	if (synonym == NULL)
		synonym = find_synonym(without_section(normal));
	if (synonym != NULL)
		return did_you_mean(source, synonym, NULL);
	struct nearest nearest = find_nearest(source, name, length, normal);
	const char *key = find_last_word(normal, &at);
	if (key != NULL && nearest.distance > 1)
		return did_you_mean(source, key, find_last_word(normal, &at));
	if (nearest.name[0] != '\0')
		return did_you_mean(source, nearest.name, NULL);
	return memory_string("; mqtt2mongo --help lists all");
}
