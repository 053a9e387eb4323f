/*
 * The configuration as a user meets it: config_load() with an argv, an environment and a file, and what it says. Files
 * are made in a directory of their own, which is the current one while the tests run.
 */
#define _GNU_SOURCE
#include "config.h"
#include "config_table.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <mosquitto.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum { ARGUMENTS_MAX = 32, NAME_SIZE = 16, URI_SIZE = 512 };

/* One call of config_load() and what came out. */
static struct config config;
static char *arguments[ARGUMENTS_MAX + 1];
static void add(char *text, size_t size, const char *more)
{
	size_t length = strlen(text);
	snprintf(text + length, size - length, "%s", more);
}

static const char *no_environment[] = {"HOME=/home/nobody", NULL};
static const char **environment = no_environment;
static char *said;    /* on standard error */
static char *printed; /* on standard output */

static void forget(void)
{
	config_finish(&config);
	for (int i = 0; i < ARGUMENTS_MAX; i++) {
		free(arguments[i]);
		arguments[i] = NULL;
	}
	free(said);
	free(printed);
	said = printed = NULL;
}

static int finish(void **state)
{
	forget();
	environment = no_environment;
	return 0;
}

/* Load with these flags, separated by '|'. */
static enum config_action load(const char *flags)
{
	forget();
	size_t said_length, printed_length;
	FILE *errors = open_memstream(&said, &said_length), *output = open_memstream(&printed, &printed_length);
	int count = 0;
	arguments[count++] = strdup("mqtt2mongo");
	while (flags != NULL) {
		const char *end = strchrnul(flags, '|');
		assert_in_range(count, 0, ARGUMENTS_MAX - 1);
		arguments[count++] = strndup(flags, (size_t)(end - flags));
		flags = *end == '|' ? end + 1 : NULL;
	}
	enum config_action action = config_load(&config, count, arguments, (char **)environment, output, errors);
	fclose(errors);
	fclose(output);
	return action;
}

static void write_file(const char *name, const char *text)
{
	FILE *file = fopen(name, "w");
	assert_non_null(file);
	fputs(text, file);
	fclose(file);
	chmod(name, 0600);
}

static void assert_says(const char *text)
{
	if (strstr(said, text) == NULL)
		fail_msg("\"%s\" is not in:\n%s", text, said);
}

static void assert_silent(enum config_action expected, enum config_action action)
{
	if (action != expected || said[0] != '\0')
		fail_msg("action %d, said:\n%s", (int)action, said);
}

/* These flags are refused with these words. */
static void refuses(const char *flags, const char *text)
{
	assert_int_equal(load(flags), CONFIG_INVALID);
	assert_says("error: ");
	assert_says(text);
}

/* This file is refused with these words, and these words are one whole line. */
static void refuses_file(const char *file, const char *text)
{
	write_file("a.json", file);
	assert_int_equal(load("--role|both|-c|a.json"), CONFIG_INVALID);
	char *line;
	assert_true(asprintf(&line, "error: a.json:%s\n", text) > 0);
	assert_says(line);
	free(line);
}

static void accepts(const char *flags)
{
	assert_silent(CONFIG_RUN, load(flags));
}

static void warns(const char *flags, const char *text)
{
	assert_int_equal(load(flags), CONFIG_RUN);
	assert_says("warning: ");
	assert_says(text);
}

static void defaults(void **state)
{
	accepts("--role|both");
	assert_int_equal(config.role, CONFIG_ROLE_BOTH);
	assert_string_equal(config.mqtt.host, "localhost");
	assert_int_equal(config.mqtt.port, 1883);
	assert_null(config.mqtt.username);
	assert_null(config.mqtt.password);
	assert_null(config.mqtt.client_id);
	assert_int_equal(config.mqtt.protocol, 5);
	assert_int_equal(config.mqtt.keepalive_ms, 60000);
	assert_int_equal(config.mqtt.connect_timeout_ms, 5000);
	assert_int_equal(config.mqtt.session_expiry_ms, 7LL * 86400000);
	assert_int_equal(config.mqtt.receive_maximum, 800);
	assert_true(config.mqtt.watch_broker);
	assert_false(config.mqtt.tls.enabled);
	assert_int_equal(config.mqtt.reconnect_min_ms, 1000);
	assert_int_equal(config.mqtt.reconnect_max_ms, 30000);
	assert_string_equal(config.mongodb.uri, "mongodb://localhost:27017");
	assert_string_equal(config.mongodb.database, "mqtt2mongo");
	assert_string_equal(config.mongodb.w, "majority");
	assert_true(config.mongodb.j);
	assert_int_equal(config.mongodb.write_timeout_ms, 10000);
	assert_false(config.mongodb.w_set || config.mongodb.j_set || config.mongodb.write_timeout_set);
	assert_string_equal(config.consumer.topic, "sensors/#");
	assert_int_equal(config.consumer.qos, 1);
	assert_string_equal(config.consumer.collection, "messages");
	assert_string_equal(config.consumer.dead_letter, "dead_letter");
	assert_int_equal(config.consumer.workers, 2);
	assert_int_equal(config.consumer.max_payload, 4 << 20);
	assert_int_equal(config.consumer.batch_count, 4096);
	assert_int_equal(config.consumer.batch_bytes, 8 << 20);
	assert_string_equal(config.publisher.topic, "sensors/{device}/readings");
	assert_true(fabs(config.publisher.rate - 1) < 1e-9);
	assert_int_equal(config.publisher.count, 0);
	assert_int_equal(config.publisher.qos, 1);
	assert_int_equal(config.publisher.devices, 10);
	assert_false(config.publisher.seed_set);
	assert_int_equal(config.shutdown_timeout_ms, 10000);
	assert_int_equal(config.log_level, LOG_LEVEL_INFO);
	assert_int_equal(config.log_format, LOG_FORMAT_TEXT);
	assert_int_equal(config.log_status, CONFIG_STATUS_AUTO);
	assert_null(config.file);
}

static void precedence(void **state)
{
	const char *variables[] = {"HOME=/h", "MQTT2MONGO_MQTT_HOST=environment", "MQTT2MONGO_MQTT_PORT=2",
	                           "MQTT2MONGO_MQTT_TLS_ENABLED=true", NULL};
	write_file("a.json",
	           "{\"role\": \"both\", \"mqtt\": {\"host\": \"file\", \"port\": 1, \"username\": \"file\"}}");
	environment = variables;
	accepts("--mqtt-host=flag|-c|a.json");
	assert_string_equal(config.mqtt.host, "flag");
	assert_int_equal(config.mqtt.port, 2);
	assert_string_equal(config.mqtt.username, "file");
	assert_true(config.mqtt.tls.enabled);
	assert_string_equal(config.file, "a.json");
	accepts("--config=a.json|--mqtt-host|one|--mqtt-host|two");
	assert_string_equal(config.mqtt.host, "two");
}

static void losing_values_are_checked_too(void **state)
{
	write_file("a.json", "{\"mqtt\": {\n\"port\": 0}}");
	refuses("--role|both|-c|a.json|--mqtt-port|1",
	        "a.json:2: mqtt.port: 0 is out of range, allowed are 1 to 65535");
}

static void all_errors_are_said(void **state)
{
	refuses("--mqtt-port|0|--mqtt-keepalive|1s|--nonsense-flag", "--mqtt-port: ");
	assert_says("--mqtt-keepalive: \"1s\" is out of range, allowed are 5s to 65535s");
	assert_says("unknown flag --nonsense-flag; mqtt2mongo --help lists all");
	assert_says("no role is given");
}

static void role_is_missing(void **state)
{
	refuses("--mqtt-port|1", "error: no role is given");
	assert_says("\n  mqtt2mongo --role publisher --mqtt-host localhost\n");
	assert_says("\n  mqtt2mongo --role consumer ");
	assert_says("\n  mqtt2mongo --role both\n");
	refuses("--role|reader", "--role: \"reader\" is none of: publisher, consumer, both");
	assert_null(strstr(said, "no role"));
}

/* log.format holds for what is said of the configuration too, wherever it is set. */
static void complaints_as_json(void **state)
{
	static const char *const LEVELS[] = {"error", "warn", "warn", "info"};
	write_file("a.json", "{\"log\": {\"format\": \"json\"}, \"consumer\": {\"qos\": 2}}");
	assert_int_equal(load("--mqtt-password|x|--mqtt-session-expiry|0s|-c|a.json"), CONFIG_INVALID);
	unsigned seen[4] = {0}, lines = 0;
	for (char *line = strtok(said, "\n"); line != NULL; line = strtok(NULL, "\n"), lines++) {
		cJSON *object = cJSON_ParseWithOpts(line, NULL, true);
		assert_non_null(object);
		assert_string_equal(cJSON_GetObjectItem(object, "room")->valuestring, "config");
		assert_true(strlen(cJSON_GetObjectItem(object, "message")->valuestring) > 20);
		assert_int_equal(strlen(cJSON_GetObjectItem(object, "time")->valuestring), 24);
		for (int i = 0; i < 4; i++)
			seen[i] += strcmp(cJSON_GetObjectItem(object, "level")->valuestring, LEVELS[i]) == 0;
		cJSON_Delete(object);
	}
	assert_int_equal(lines, 4);
	assert_true(seen[0] == 1 && seen[1] == 2 && seen[3] == 1);
}

static void complaints_are_escaped(void **state)
{
	write_file("a.json", "{\"mq\\u009btt\\u202e\": 1}");
	refuses("--role|both|-c|a.json", "unknown key \"mq\\u009btt\\u202e\"");
	refuses("--role|both|--mqtt-password-file|a\x1b]0;b\x07", "cannot read a\\x1b]0;b\\x07: No such file");
}

static void actions(void **state)
{
	assert_silent(CONFIG_CHECK, load("--check"));
	assert_int_equal(config.role, CONFIG_ROLE_BOTH);
	assert_silent(CONFIG_CHECK, load("--check|--role|publisher"));
	assert_int_equal(config.role, CONFIG_ROLE_PUBLISHER);
	assert_silent(CONFIG_DRY_RUN, load("--dry-run"));
	assert_int_equal(config.role, CONFIG_ROLE_CONSUMER);
	refuses("--dry-run|--role|publisher", "--role: --dry-run shows what the consumer would store");
	refuses("--dry-run|--check",
	        "--check, --dry-run, --spool-status, --spool-export and --replay-dead-letters exclude each other");
	refuses("--spool-status|--spool-export", "exclude each other");
	assert_silent(CONFIG_SPOOL_STATUS, load("--spool-status"));
	assert_silent(CONFIG_SPOOL_EXPORT, load("--spool-export|--role|publisher"));
	refuses("--replay-dead-letters|--check", "exclude each other");
}

static void replaying(void **state)
{
	assert_silent(CONFIG_REPLAY, load("--replay-dead-letters"));
	assert_int_equal(config.role, CONFIG_ROLE_CONSUMER);
	assert_null(config.replay_filter);
	assert_silent(CONFIG_REPLAY, load("--role|both|--replay-dead-letters|--filter|{\"reason.code\": \"x\"}"));
	assert_int_equal(config.role, CONFIG_ROLE_CONSUMER);
	assert_string_equal(config.replay_filter, "{\"reason.code\": \"x\"}");
	assert_silent(CONFIG_REPLAY, load("--filter= {} |--replay-dead-letters"));
	assert_silent(CONFIG_REPLAY, load("--filter={\"_id\":{\"$gt\":{\"$oid\":\"0123456789abcdef01234567\"}}}|"
	                                  "--replay-dead-letters"));
	refuses("--replay-dead-letters|--role|publisher", "--role: --replay-dead-letters stores what the consumer");
	refuses("--role|consumer|--filter|{}",
	        "--filter says which dead letters to replay, it needs --replay-dead-letters");
	refuses("--replay-dead-letters|--filter", "--filter: needs a query, as in --filter='{");
	refuses("--replay-dead-letters|--filter|--check", "--filter: needs a query");
	refuses("--replay-dead-letters|--filter={}|--filter={}", "--filter: is given twice");
	refuses("--replay-dead-letters|--filter|", "--filter: no JSON: ");
	refuses("--replay-dead-letters|--filter|{\"a\":01}", "--filter: no JSON: leading zero at byte 6");
	refuses("--replay-dead-letters|--filter|{}{}", "--filter: no JSON: ");
	refuses("--replay-dead-letters|--filter|{a:1}", "--filter: no JSON: ");
	refuses("--replay-dead-letters|--filter|[{}]", "--filter: a query is an object, as in ");
	refuses("--replay-dead-letters|--filter|{\"_id\":{\"$oid\":1}}", "--filter: no extended JSON: ");
	refuses("--replay-dead-letters|--filters|{}", "unknown flag --filters, did you mean --filter?");
	refuses("--replay-dead-leters", "unknown flag --replay-dead-leters, did you mean --replay-dead-letters?");
}

static void durations(void **state)
{
	static const struct {
		const char *text;
		int64_t ms;
	} GOOD[] = {{"100ms", 100},    {"1s", 1000},  {"1.5s", 1500}, {"2m", 120000},
	            {"10min", 600000}, {"0.1s", 100}, {"2 s", 2000},  {"0.001h", 3600}};
	for (size_t i = 0; i < sizeof GOOD / sizeof GOOD[0]; i++) {
		char *flags;
		assert_true(asprintf(&flags, "--role|both|--mqtt-connect-timeout|%s", GOOD[i].text) > 0);
		accepts(flags);
		assert_int_equal(config.mqtt.connect_timeout_ms, GOOD[i].ms);
		free(flags);
	}
	accepts("--role|both|--mqtt-session-expiry|49710d");
	assert_int_equal(config.mqtt.session_expiry_ms, 49710LL * 86400000);
	accepts("--role|both|--shutdown-timeout|0");
	assert_int_equal(config.shutdown_timeout_ms, 0);
	refuses("--role|both|--mqtt-connect-timeout|5", "\"5\" has no unit, write \"5s\" or \"5ms\"");
	refuses("--role|both|--mqtt-connect-timeout|5x", "\"5x\" is not a duration, as in \"500ms\", \"30s\"");
	refuses("--role|both|--mqtt-connect-timeout|-5s", "is not a duration");
	refuses("--role|both|--mqtt-connect-timeout|1h30m", "is not a duration");
	refuses("--role|both|--mqtt-connect-timeout|99ms", "is out of range, allowed are 100ms to 10min");
	refuses("--role|both|--mqtt-connect-timeout|601s", "is out of range");
	refuses("--role|both|--mqtt-connect-timeout|99999999999999999999999d", "is out of range");
	refuses("--role|both|--mqtt-connect-timeout|1000.5ms", "must be whole milliseconds");
	refuses("--role|both|--mqtt-keepalive|10.5s", "\"10.5s\" must be whole seconds");
	refuses("--role|both|--mqtt-keepalive|4s", "is out of range, allowed are 5s to 65535s");
	refuses("--role|both|--mqtt-keepalive|65536s", "is out of range");
	accepts("--role|both|--mqtt-keepalive|65535s");
	accepts("--role|both|--mqtt-keepalive|5s");
}

static void sizes(void **state)
{
	accepts("--role|both|--consumer-max-payload|1B");
	assert_int_equal(config.consumer.max_payload, 1);
	accepts("--role|both|--consumer-max-payload|15MiB");
	assert_int_equal(config.consumer.max_payload, 15 << 20);
	assert_int_equal(config.consumer.batch_bytes, 15 << 20);
	accepts("--role|both|--consumer-max-payload|100kB");
	assert_int_equal(config.consumer.max_payload, 100000);
	accepts("--role|both|--consumer-batch-bytes|0.25GiB");
	assert_int_equal(config.consumer.batch_bytes, 256 << 20);
	refuses("--role|both|--consumer-max-payload|0", "\"0\" is out of range, allowed are 1B to 15MiB");
	refuses("--role|both|--consumer-max-payload|15729B|--consumer-batch-bytes|65535B",
	        "allowed are 64KiB to 256MiB");
	refuses("--role|both|--consumer-max-payload|16MiB", "is out of range");
	refuses("--role|both|--consumer-max-payload|1048576",
	        "\"1048576\" has no unit, write \"1048576B\" or \"1048576MiB\"");
	refuses("--role|both|--consumer-max-payload|1Mb", "is not a size, as in \"512KiB\"");
	refuses("--role|both|--consumer-max-payload|1.5B", "must be whole bytes");
}

static void rates_and_numbers(void **state)
{
	accepts("--role|both|--publisher-rate|20/s");
	assert_true(fabs(config.publisher.rate - 20) < 1e-9);
	accepts("--role|both|--publisher-rate|6/min");
	assert_true(fabs(config.publisher.rate - 0.1) < 1e-9);
	accepts("--role|both|--publisher-rate|20000");
	accepts("--role|both|--publisher-rate|360/h");
	refuses("--role|both|--publisher-rate|5/min", "allowed are 0.1/s to 20000/s");
	refuses("--role|both|--publisher-rate|20001", "is out of range");
	refuses("--role|both|--publisher-rate|x", "is not a rate, as in \"20/s\", \"5/min\", \"100/h\"");
	accepts("--role|both|--publisher-seed|18446744073709551615");
	assert_true(config.publisher.seed_set && config.publisher.seed == UINT64_MAX);
	accepts("--role|both|--publisher-seed|0");
	assert_true(config.publisher.seed_set);
	accepts("--role|both|--publisher-seed|random");
	assert_false(config.publisher.seed_set);
	refuses("--role|both|--publisher-seed|-1", "is not a seed");
	refuses("--role|both|--publisher-seed|18446744073709551616", "is not a seed");
	refuses("--role|both|--publisher-count|-1", "allowed are 0 to 1000000000000000");
	refuses("--role|both|--publisher-count|1e3", "\"1e3\" is not a whole number");
	refuses("--role|both|--publisher-devices|0", "allowed are 1 to 1000000");
	refuses("--role|both|--consumer-workers|65", "allowed are 1 to 64");
	refuses("--role|both|--consumer-batch-count|65536", "allowed are 1 to 65535");
	refuses("--role|both|--mqtt-receive-maximum|0", "allowed are 1 to 65535");
	refuses("--role|both|--consumer-qos|3", "3 is out of range, allowed are 0 to 2");
	refuses("--role|both|--mqtt-port|99999999999999999999", "is not a whole number");
	refuses("--role|both|--mqtt-protocol|4", "\"4\" is none of: 5, 3.1.1");
}

static void booleans(void **state)
{
	accepts("--role|both|--mqtt-tls-enabled");
	assert_true(config.mqtt.tls.enabled);
	assert_int_equal(config.mqtt.port, 8883);
	accepts("--role|both|--mqtt-tls-enabled|--mqtt-port|1883");
	assert_int_equal(config.mqtt.port, 1883);
	accepts("--mqtt-tls-enabled|false|--role|both");
	assert_false(config.mqtt.tls.enabled);
	accepts("--mqtt-tls-enabled=false|--role|both");
	assert_false(config.mqtt.tls.enabled);
	refuses("--role|both|--mqtt-tls-enabled=yes", "\"yes\" is neither true nor false");
}

static void broken_flags(void **state)
{
	refuses("--role|both|--mqtt-host", "--mqtt-host needs a value, as in --mqtt-host=VALUE");
	refuses("--role|both|--mqtt-host|--check", "--mqtt-host needs a value");
	refuses("--role|both|--mqtt-host|", "--mqtt-host: is empty; give a value or leave it out to get the default");
	refuses("--role|both|stray", "argument 3 belongs to no flag");
	refuses("--role|both|-c", "-c needs a file");
	refuses("--role|both|-c|missing.json", "cannot read missing.json: No such file or directory");
	refuses("--role|both|-c|.", "cannot read .: Is a directory");
	refuses("--role|both|-c|a|--config|b", "-c is given twice");
	refuses("--role|both|--chekc", "unknown flag --chekc, did you mean --check?");
	refuses("--role|both|--unknown=hunter2|--unknown|hunter2", "unknown flag --unknown");
	assert_null(strstr(said, "hunter2"));
}

static void synonyms(void **state)
{
	static const char *const PAIRS[][2] = {
	    {"--mqtt-broker", "--mqtt-host"},
	    {"--broker", "--mqtt-host"},
	    {"--server", "--mqtt-host"},
	    {"--mqtt-url", "--mqtt-host"},
	    {"--port", "--mqtt-port"},
	    {"--user", "--mqtt-username"},
	    {"--username", "--mqtt-username"},
	    {"--password", "--mqtt-password"},
	    {"--MONGO_URI", "--mongodb-uri"},
	    {"--mongo-database", "--mongodb-database"},
	    {"--database-name", "--mongodb-database"},
	    {"--db", "--mongodb-database"},
	    {"--mongodb-host", "--mongodb-uri"},
	    {"--mqtt-hots", "--mqtt-host"},
	    {"--mqtt_host", "--mqtt-host"},
	    {"--topic", "--consumer-topic or --publisher-topic"},
	    {"--ca", "--mqtt-tls-ca"},
	    {"--tls", "--mqtt-tls-enabled"},
	    {"--consumer-batch-cuont", "--consumer-batch-count"},
	    {"--verison", "--version"},
	};
	for (size_t i = 0; i < sizeof PAIRS / sizeof PAIRS[0]; i++) {
		char *flags, *text;
		assert_true(asprintf(&flags, "--role|both|%s|x", PAIRS[i][0]) > 0);
		assert_true(asprintf(&text, "unknown flag %s, did you mean %s?", PAIRS[i][0], PAIRS[i][1]) > 0);
		refuses(flags, text);
		free(flags);
		free(text);
	}
	const char *variables[] = {"HOME=/h",
	                           "MQTT2MONGO_BROKER=s3cret",
	                           "MQTT2MONGO_MONGO_URI=s3cret",
	                           "MQTT2MONGO_DATABASE_NAME=q",
	                           "MQTT2MONGO_PORT=x",
	                           "MQTT2MONGO_ZZZZZZZZ=1",
	                           NULL};
	environment = variables;
	warns("--role|both", "MQTT2MONGO_BROKER has no effect, did you mean MQTT2MONGO_MQTT_HOST?");
	assert_says("MQTT2MONGO_MONGO_URI has no effect, did you mean MQTT2MONGO_MONGODB_URI?");
	assert_says("MQTT2MONGO_DATABASE_NAME has no effect, did you mean MQTT2MONGO_MONGODB_DATABASE?");
	assert_says("MQTT2MONGO_PORT has no effect, did you mean MQTT2MONGO_MQTT_PORT?");
	assert_says("MQTT2MONGO_ZZZZZZZZ has no effect; mqtt2mongo --help lists all");
	assert_null(strstr(said, "s3cret"));
	refuses_file("{\"mqtt\": {\n\"broker\": 1}}", "2: unknown key \"mqtt.broker\", did you mean mqtt.host?");
	refuses_file("{\"MONGO_URI\": 1}", "1: unknown key \"MONGO_URI\", did you mean mongodb.uri?");
	refuses_file("{\"mqt\": {\"host\": {}}}", "1: unknown key \"mqt\", did you mean mqtt?");
}

static void broken_environment(void **state)
{
	const char *variables[] = {"HOME=/h", "MQTT2MONGO_MQTT_PORT=", "MQTT2MONGO_ROLE=both",
	                           "MQTT2MONGO_MQTT_KEEPALIVE=60", NULL};
	environment = variables;
	refuses("--mqtt-host|x", "MQTT2MONGO_MQTT_PORT: is empty; give a value or leave it out to get the default");
	assert_says("MQTT2MONGO_MQTT_KEEPALIVE: \"60\" has no unit, write \"60s\" or \"60ms\"");
}

static void comments(void **state)
{
	write_file("a.json",
	           "// first\n{/* \" // */ \"role\": /**/ \"both\", // \"mqtt\": {}\r\n"
	           "\"mqtt\": {\"client_id\": \"a//b/*c*/\\\"//\", /* two\nlines **/ \"username\": \"u\"}}//end");
	accepts("-c|a.json");
	assert_string_equal(config.mqtt.client_id, "a//b/*c*/\"//");
	assert_string_equal(config.mqtt.username, "u");
	refuses_file("{}\n  /* open", "2:3: the comment that starts here is not closed with */");
	refuses_file("{} /*/", "1:4: the comment that starts here is not closed with */");
	refuses_file("/* a\n\n */ {\"mqtt\": // x\n {\"x\": 1}}",
	             "4: unknown key \"mqtt.x\"; mqtt2mongo --help lists all");
}

static void syntax_errors_have_a_place(void **state)
{
	static const char *const BROKEN[][2] = {
	    {"{\n  \"mqtt\": {\n    \"port\": 01\n}}", "error: a.json:3:1"},
	    {"{\"mqtt\": {},}", "error: a.json:1:13: "},
	    {"{\n\"mqtt\": {}", "error: a.json:2:11: "},
	    {"{'a': 1}", "error: a.json:1:2: "},
	    {"{} {}", "error: a.json:1:4: "},
	    {"{} / {}", "error: a.json:1:4: "},
	    {"{\"a\": \"\xff\"}", "error: a.json:1:8: "},
	    {"", "error: a.json:1:1: the file is empty, the least it can hold is {}"},
	    {"\n [1]", "error: a.json:2:2: the file must hold one object"},
	    {"{\"a\":\n 1e-0000000000000000000000000000000000000000000000000000000000000000000000001}",
	     "error: a.json:"},
	};
	for (size_t i = 0; i < sizeof BROKEN / sizeof BROKEN[0]; i++) {
		write_file("a.json", BROKEN[i][0]);
		refuses("--role|both|-c|a.json", BROKEN[i][1]);
	}
}

static void wrong_types(void **state)
{
	refuses_file("{\"mqtt\": {\"port\": \"1883\"}}",
	             "1: mqtt.port: is \"1883\", must be a whole number, without quotes");
	refuses_file("{\"mqtt\":\n{\"host\":\n\n5}}", "2: mqtt.host: is 5, must be a text in quotes");
	refuses_file("{\"mqtt\": {\"host\": null}}",
	             "1: mqtt.host: is null; give a value or leave it out to get the default");
	refuses_file("{\"mqtt\": {\"host\": {\"a\": 1}, \n\"x\": 2}}",
	             "1: mqtt.host: is an object, must be a text in quotes");
	assert_says("a.json:2: unknown key \"mqtt.x\"");
	refuses_file("{\"mqtt\": {\"host\": [{\"a\": 1, \"b\": [{\"c\": 2}]}]\n, \"x\": 2}}",
	             "1: mqtt.host: is a list, must be a text in quotes");
	assert_says("a.json:2: unknown key \"mqtt.x\"");
	refuses_file("{\"mqtt\": {\"keepalive\": 60}}", "1: mqtt.keepalive: 60 has no unit, write \"60s\" or \"60ms\"");
	refuses_file("{\"mqtt\": {\"keepalive\": true}}",
	             "1: mqtt.keepalive: is true, must be a duration, as in \"500ms\", \"30s\", \"5min\", \"7d\"");
	refuses_file("{\"mongodb\": {\"write_concern\": {\"j\": \"true\"}}}",
	             "1: mongodb.write_concern.j: is \"true\", must be true or false, without quotes");
	refuses_file("{\"mqtt\": {\"port\": \"mqtt://u:s3cret@h\"}}",
	             "1: mqtt.port: is \"mqtt://***@h\", must be a whole number, without quotes");
	assert_null(strstr(said, "s3cret"));
	refuses_file("{\"mqtt\": {\"password\": 5318008}}", "1: mqtt.password: is a number, must be a text in quotes");
	assert_null(strstr(said, "5318008"));
	refuses_file("{\"mqtt\": {\"password\": [\"s3cret\"]}}",
	             "1: mqtt.password: is a list, must be a text in quotes");
	assert_null(strstr(said, "s3cret"));
	refuses_file("{\"mqtt\": \"x\"}", "1: mqtt is a section, must be an object: \"mqtt\": { … }");
	refuses_file("{\"mqtt.host\": \"x\"}",
	             "1: \"mqtt.host\" must be nested, one object for each dot, as in \"mqtt\": { "
	             "\"host\": … }");
	refuses_file("{\"mqtt\": {\"host\": \"a\\u0000b\"}}",
	             "1: mqtt.host: holds a NUL character (\\u0000), take it out");
	refuses_file("{\"mqtt\": {\"port\": 1.5}}", "1: mqtt.port: 1.5 is not a whole number");
	refuses_file("{\"mqtt\": {\"host\": \"a\",\n\"host\": \"b\"}}", "2: mqtt.host is in the file twice, keep one");
	refuses_file("{\"mqtt\": {},\n\"mqtt\": {\"x\": 1},\n\"y\": 1}", "2: mqtt is in the file twice, keep one");
	assert_says("a.json:3: unknown key \"y\"");
}

static void numbers_in_the_file(void **state)
{
	write_file("a.json", "{\"role\": \"both\", \"publisher\": {\"rate\": 20, \"seed\": 18446744073709551615},"
	                     "\"mqtt\": {\"protocol\": 5}, \"shutdown_timeout\": 0, \"consumer\": {\"max_payload\": "
	                     "\"2MiB\"}}");
	accepts("-c|a.json");
	assert_true(config.publisher.seed == UINT64_MAX);
	assert_int_equal(config.shutdown_timeout_ms, 0);
	assert_int_equal(config.consumer.max_payload, 2 << 20);
}

static void hosts(void **state)
{
	refuses("--role|both|--mqtt-host|mqtt://h:1884",
	        "--mqtt-host: is a URL, write mqtt.host \"h\", mqtt.port 1884 instead");
	refuses("--role|both|--mqtt-host|mqtts://u:s3cret@h/",
	        "is a URL, write mqtt.host \"h\", mqtt.tls.enabled true, mqtt.username and mqtt.password_file instead");
	assert_null(strstr(said, "s3cret"));
	refuses("--role|both|--mqtt-host|ws://h", "MQTT over WebSockets is not supported");
	refuses("--role|both|--mqtt-host|h:1884", "holds a port, write mqtt.host \"h\" and mqtt.port 1884 instead");
	/* What may be a password is in no complaint and no warning, also where mqtt.password is given as well. */
	static const char *const hosts[] = {"user:hushhush@h", "mqtt://user:hushhush@h", "user:hushhush",
	                                    "user:hushhush@h:1"};
	for (size_t i = 0; i < sizeof hosts / sizeof *hosts; i++) {
		char flags[200];
		snprintf(flags, sizeof flags, "--role|both|--mqtt-username|u|--mqtt-password|p|--mqtt-host|%s",
		         hosts[i]);
		refuses(flags, "--mqtt-host: ");
		if (strstr(said, "hushhush") != NULL)
			fail_msg("%s: %s", hosts[i], said);
	}
	refuses("--role|both|--mqtt-host|[::1]", "without brackets");
	refuses("--role|both|--mqtt-host|a b", "is not a host name or address");
	accepts("--role|both|--mqtt-host|::1");
	accepts("--role|both|--mqtt-host|fe80::1%eth0");
}

static void identity(void **state)
{
	refuses("--role|both|--mqtt-client-id|a\xff", "--mqtt-client-id: is not UTF-8 without control characters");
	refuses("--role|both|--mqtt-username|a\n", "--mqtt-username: is not UTF-8 without control characters");
	accepts("--role|both|--mqtt-username|é|--mqtt-client-id|a");
}

static void topics(void **state)
{
	static const char *const GOOD[] = {"#", "+", "a/+/b/#", "/", "$SYS/#", "a//b", "é/#", "+/+"};
	static const char *const BAD[][2] = {{"a/#/b", "# must be a whole level and the last one"},
	                                     {"a#", "# must be a whole level and the last one"},
	                                     {"#/", "# must be a whole level and the last one"},
	                                     {"a+/b", "+ must be a whole level"},
	                                     {"a/+b", "+ must be a whole level"},
	                                     {"", "is empty"},
	                                     {"a\x01", "is not UTF-8 without control characters"},
	                                     {"a\xff", "is not UTF-8"},
	                                     {"a\xc0\x80", "is not UTF-8"},
	                                     {"a\xed\xa0\x80", "is not UTF-8"},
	                                     {"$share/g/a",
	                                      "give the filter without $share/GROUP/, and the name of the group in "
	                                      "consumer.share"}};
	char *flags;
	for (size_t i = 0; i < sizeof GOOD / sizeof GOOD[0]; i++) {
		assert_true(asprintf(&flags, "--role|both|--consumer-topic=%s", GOOD[i]) > 0);
		accepts(flags);
		free(flags);
	}
	for (size_t i = 0; i < sizeof BAD / sizeof BAD[0]; i++) {
		assert_true(asprintf(&flags, "--role|both|--consumer-topic=%s", BAD[i][0]) > 0);
		refuses(flags, BAD[i][1]);
		free(flags);
	}
	assert_true(asprintf(&flags, "--role|both|--consumer-topic=%065535d", 0) > 0);
	accepts(flags);
	free(flags);
	assert_true(asprintf(&flags, "--role|both|--consumer-topic=%065536d", 0) > 0);
	refuses(flags, "is longer than 65535 bytes");
	free(flags);
	refuses("--role|both|--publisher-topic|a/+", "+ and # are for subscribing only, write {device}");
	refuses("--role|both|--publisher-topic|a/#", "+ and # are for subscribing only");
	warns("--role|both|--publisher-topic|a/{devcie}", "only {device} is replaced");
}

/* Each of these pairs of filters, in either order; a topic that both match, or none. */
static void filters_that_meet(void **state)
{
	static const char *const MEET[][2] = {
	    {"sensors/#", "sensors/a"},
	    {"sensors/#", "sensors"},
	    {"sensors/#", "sensors/+/fast"},
	    {"sensors/#", "sensors/#"},
	    {"#", "a"},
	    {"#", "+/+"},
	    {"a/+", "a/b"},
	    {"a/+/c", "a/b/+"},
	    {"+/a", "b/+"},
	    {"a/+/#", "a/b"},
	    {"a/b/#", "a/+"},
	    {"+", "#"},
	    {"/#", "+/a"},
	    {"/", "+/+"},
	    {"$SYS/#", "$SYS/broker/+"},
	    {"a/#", "+/+/c/d/#"},
	    {"$SYS/+", "$SYS/x"},
	};
	static const char *const APART[][2] = {
	    {"sensors/#", "camera/#"}, {"sensors/#", "sensor"}, {"a/+", "a"},    {"a/+", "a/b/c"},
	    {"a/+/c", "a/+/d"},        {"a/+/#", "a"},          {"+", "a/b"},    {"a", "a/"},
	    {"#", "$SYS/a"},           {"+/a", "$SYS/a"},       {"#", "$SYS/#"}, {"a", "A"},
	    {"aa/#", "a/#"},
	};
	char *flags;
	for (size_t i = 0; i < 2 * (sizeof MEET / sizeof MEET[0]); i++) {
		const char *topic = MEET[i / 2][i % 2], *qos0 = MEET[i / 2][1 - i % 2];
		assert_true(asprintf(&flags, "--role|both|--consumer-topic=%s|--consumer-qos0-topic=%s", topic, qos0) >
		            0);
		refuses(flags, "--consumer-qos0-topic: a topic can match this filter and consumer.topic as well");
		free(flags);
	}
	for (size_t i = 0; i < 2 * (sizeof APART / sizeof APART[0]); i++) {
		const char *topic = APART[i / 2][i % 2], *qos0 = APART[i / 2][1 - i % 2];
		assert_true(asprintf(&flags, "--role|both|--consumer-topic=%s|--consumer-qos0-topic=%s", topic, qos0) >
		            0);
		accepts(flags);
		free(flags);
	}
	refuses("--role|both|--consumer-topic|a/#/b|--consumer-qos0-topic|a", "# must be a whole level");
	assert_null(strstr(said, "can match this filter"));
}

static const char *const FIRST[] = {"a", "$x", "+", "#"}, *const FURTHER[] = {"a", "b", "+", "#"};

/* The number-th filter or topic of one to `most` levels, of `kinds` kinds each; false: there is no such. */
static bool name_levels(unsigned number, unsigned kinds, unsigned most, char name[NAME_SIZE])
{
	unsigned levels = 1, all = kinds;
	while (number >= all && levels < most) {
		number -= all;
		all *= kinds;
		levels++;
	}
	name[0] = '\0';
	for (unsigned level = 0; level < levels; level++, number /= kinds) {
		add(name, NAME_SIZE, level == 0 ? "" : "/");
		add(name, NAME_SIZE, (level == 0 ? FIRST : FURTHER)[number % kinds]);
	}
	return number == 0;
}

static bool matches(const char *filter, const char *topic)
{
	bool result = false;
	assert_int_equal(mosquitto_topic_matches_sub(filter, topic, &result), MOSQ_ERR_SUCCESS);
	return result;
}

static bool a_topic_matches(const char *a, const char *b)
{
	char topic[NAME_SIZE];
	for (unsigned i = 0; name_levels(i, 2, 4, topic); i++)
		if (matches(a, topic) && matches(b, topic))
			return true;
	return false;
}

/* The library that matches topics against filters is asked about all short ones. */
static void filters_meet_where_a_topic_matches_both(void **state)
{
	char a[16], b[16], *flags;
	unsigned pairs = 0;
	for (unsigned i = 0; name_levels(i, 4, 3, a); i++)
		for (unsigned j = 0; name_levels(j, 4, 3, b); j++) {
			if (mosquitto_sub_topic_check(a) != MOSQ_ERR_SUCCESS ||
			    mosquitto_sub_topic_check(b) != MOSQ_ERR_SUCCESS)
				continue;
			assert_true(asprintf(&flags, "--role|both|--consumer-topic=%s|--consumer-qos0-topic=%s", a, b) >
			            0);
			bool meet = load(flags) == CONFIG_INVALID;
			free(flags);
			if (meet != a_topic_matches(a, b))
				fail_msg("%s and %s meet: %d", a, b, meet);
			pairs++;
		}
	assert_true(pairs > 1500);
}

/* What looks like several filters or collections, and has no such meaning. */
static void one_filter_and_one_collection(void **state)
{
	static const char twice[] =
	    "--consumer-topic: is given twice, there is one filter only; take one that matches all, or "
	    "run a service with a state_dir of its own for each";
	refuses("--role|both|--consumer-topic|a/#|--consumer-topic|b/#", twice);
	refuses("--role|both|--consumer-topic=a/#|--consumer-topic=a/#", twice);
	refuses("--role|both|--consumer-qos0-topic|a|--consumer-qos0-topic|b", "--consumer-qos0-topic: is given twice");
	refuses("--role|both|--consumer-id|topic|--consumer-id|/ts",
	        "--consumer-id: is given twice, give all its parts in one, between commas");
	accepts("--role|both|--publisher-rate|1/s|--publisher-rate|2/s"); /* as a wrapper's flags and the user's: the
	                                                                     last */
	assert_true(config.publisher.rate == 2);
	write_file("a.json", "{\"consumer\": {\"topic\": \"a/#\"}}");
	accepts("--role|both|-c|a.json|--consumer-topic|b/#"); /* a flag beats the file, as ever */
	refuses("--role|both|--consumer-topic|a/#,b/#",
	        "--consumer-topic: holds a comma, there is one filter only; take one that matches all, or run a "
	        "service with a "
	        "state_dir of its own for each; for a comma in a topic write + for that level");
	refuses("--role|both|--consumer-qos0-topic|a,b", "--consumer-qos0-topic: holds a comma");
	accepts("--role|both|--publisher-topic|a,b");
	refuses("--role|both|--consumer-collection|m_{device}",
	        "--consumer-collection: nothing is put in for braces, all messages go into one collection; give a name "
	        "without them");
	refuses("--role|both|--consumer-dead-letter|}", "--consumer-dead-letter: nothing is put in for braces");
}

static void share_groups(void **state)
{
	char *flags;
	assert_int_equal(load("--role|consumer"), CONFIG_RUN);
	assert_int_equal(config.consumer.connections, 1);
	assert_null(config.consumer.share);
	accepts("--role|consumer|--consumer-share|plant-7|--consumer-connections|64");
	assert_string_equal(config.consumer.share, "plant-7");
	assert_int_equal(config.consumer.connections, 64);
	accepts("--role|consumer|--mqtt-client-id|plant|--consumer-connections|2");
	refuses("--role|consumer|--consumer-connections|0",
	        "--consumer-connections: 0 is out of range, allowed are 1 to 64");
	refuses("--role|consumer|--consumer-connections|65",
	        "--consumer-connections: 65 is out of range, allowed are 1 to 64");
	refuses("--role|consumer|--consumer-connections|x", "--consumer-connections");
	refuses("--role|consumer|--consumer-share|", "--consumer-share: is empty");
	refuses("--role|consumer|--consumer-share|a/b", "--consumer-share: the name of a share group holds no / + #");
	refuses("--role|consumer|--consumer-share|a+", "--consumer-share: the name of a share group holds no / + #");
	refuses("--role|consumer|--consumer-share|#", "--consumer-share: the name of a share group holds no / + #");
	refuses("--role|consumer|--consumer-share|a\n", "--consumer-share: is not UTF-8 without control characters");
	refuses("--role|consumer|--mqtt-client-id|plant/7|--consumer-connections|2",
	        "--consumer-connections: several connections form a share group, which cannot have the name of "
	        "mqtt.client_id because of its / + or #; give one in consumer.share");
	accepts("--role|consumer|--mqtt-client-id|plant/7|--consumer-connections|2|--consumer-share|plant-7");
	refuses("--role|consumer|--consumer-qos|0|--consumer-connections|2",
	        "--consumer-connections: with consumer.qos 0 there is one connection only");
	refuses("--role|consumer|--consumer-qos|0|--consumer-share|g",
	        "--consumer-share: has no effect with consumer.qos 0");
	assert_true(asprintf(&flags, "--role|consumer|--consumer-topic=a|--consumer-share=%065526d", 0) > 0);
	accepts(flags);
	free(flags);
	assert_true(asprintf(&flags, "--role|consumer|--consumer-topic=a|--consumer-share=%065527d", 0) > 0);
	refuses(flags, "--consumer-share: is too long");
	free(flags);
}

static void mongodb_names(void **state)
{
	refuses("--role|both|--mongodb-database|a b", "MongoDB allows no space");
	refuses("--role|both|--mongodb-database|a.b", "MongoDB allows no space");
	refuses("--role|both|--mongodb-database|local", "belong to MongoDB itself");
	refuses("--role|both|--mongodb-database|0123456789012345678901234567890123456789012345678901234567890123",
	        "is longer than 63 bytes");
	refuses("--role|both|--consumer-collection|a$b", "--consumer-collection: MongoDB allows no $");
	refuses("--role|both|--consumer-dead-letter|system.x", "--consumer-dead-letter: names that start with system.");
	refuses("--role|both|--consumer-collection|.a", "must not start or end with a dot");
	refuses("--role|both|--consumer-collection|dead_letter",
	        "consumer.dead_letter: is the same as consumer.collection");
}

static void crossed_values(void **state)
{
	refuses("--role|both|--mqtt-reconnect-min|31s", "--mqtt-reconnect-min: is longer than mqtt.reconnect.max");
	accepts("--role|both|--mqtt-reconnect-min|30s");
	refuses("--role|both|--consumer-batch-bytes|64KiB|--consumer-max-payload|4MiB",
	        "--consumer-batch-bytes: is less than consumer.max_payload");
	accepts("--role|both|--consumer-batch-bytes|64KiB"); /* beside the default: one message always fits */
	assert_int_equal(config.consumer.batch_bytes, 64 << 10);
	warns("--role|both|--mqtt-protocol|3.1.1|--mqtt-session-expiry|1d",
	      "--mqtt-session-expiry: has no effect with MQTT 3.1.1, there the broker decides");
	warns("--role|both|--mqtt-protocol|3.1.1|--mqtt-receive-maximum|1", "--mqtt-receive-maximum: has no effect");
	accepts("--role|both|--mqtt-protocol|3.1.1");
	assert_int_equal(config.mqtt.protocol, 4);
	warns("--role|both|--mqtt-session-expiry|0", "the broker forgets unacknowledged messages");
	warns("--role|both|--consumer-qos|0", "0 promises less than 1");
	assert_int_equal(load("--role|both|--consumer-qos|2"), CONFIG_RUN);
	assert_says("note: --consumer-qos: subscribed as QoS 1");
}

static void tls(void **state)
{
	write_file("pem", "x");
	refuses("--role|both|--mqtt-tls-enabled|--mqtt-tls-cert|pem", "--mqtt-tls-cert: needs mqtt.tls.key");
	refuses("--role|both|--mqtt-tls-enabled|--mqtt-tls-key|pem", "--mqtt-tls-key: needs mqtt.tls.cert");
	refuses("--role|both|--mqtt-tls-enabled|--mqtt-tls-ca|none", "--mqtt-tls-ca: cannot read none: No such file");
	refuses("--role|both|--mqtt-tls-enabled|--mqtt-tls-ca|.", "is a directory");
	refuses("--role|both|--mqtt-tls-ca|pem", "has no effect without TLS, set mqtt.tls.enabled to true");
	accepts("--role|both|--mqtt-tls-enabled|--mqtt-tls-cert|pem|--mqtt-tls-key|pem|--mqtt-tls-ca|pem");
	warns("--role|both|--mqtt-tls-enabled|--mqtt-tls-insecure", "host name is not checked");
}

static void assert_part(size_t index, enum id_kind kind, const char *name)
{
	assert_in_range(index, 0, config.consumer.id.count - 1);
	assert_int_equal(config.consumer.id.parts[index].kind, kind);
	assert_string_equal(config.consumer.id.parts[index].name, name);
}

static void accepts_file(const char *file)
{
	write_file("a.json", file);
	accepts("--role|both|-c|a.json");
}

/* A list: an array in the file, its text or commas elsewhere. */
static void ids(void **state)
{
	accepts("--role|both");
	assert_int_equal(config.consumer.id.count, 0);
	accepts("--role|both|--consumer-id|objectid");
	assert_int_equal(config.consumer.id.count, 0);
	accepts("--role|both|--consumer-id|topic,/seq");
	assert_int_equal(config.consumer.id.count, 2);
	assert_part(0, ID_TOPIC, "topic");
	assert_part(1, ID_POINTER, "seq");
	accepts("--role|both|--consumer-id|user-property:a b");
	assert_part(0, ID_PROPERTY, "a b");
	accepts("--role|both|--consumer-id| [ \"topic\",\n\"/a,b\" , \"user-property:[x]\" ] ");
	assert_int_equal(config.consumer.id.count, 3);
	assert_part(1, ID_POINTER, "a,b");
	assert_part(2, ID_PROPERTY, "[x]");
	const char *variables[] = {"HOME=/home/nobody", "MQTT2MONGO_CONSUMER_ID=/id,topic", NULL};
	environment = variables;
	accepts("--role|both");
	assert_part(0, ID_POINTER, "id");
	accepts_file("{\"consumer\": {\"id\": [\"topic\"]}}");
	assert_part(0, ID_POINTER, "id");
	environment = no_environment;
	accepts_file("{\"consumer\": {\"id\": [\"topic\"]}}");
	assert_int_equal(config.consumer.id.count, 1);
	assert_part(0, ID_TOPIC, "topic");
	accepts_file("{\"consumer\": {\"id\": \"objectid\"}}");
	assert_int_equal(config.consumer.id.count, 0);
	accepts_file(
	    "{\"consumer\": {\"id\": [ // brackets, quotes and comments\n\"/]\\\"[\", \"user-property://x\"],\n"
	    "\"topic\": \"a/#\"}}");
	assert_int_equal(config.consumer.id.count, 2);
	assert_part(0, ID_POINTER, "]\"[");
	assert_part(1, ID_PROPERTY, "//x");
	assert_string_equal(config.consumer.topic, "a/#");
}

static void ids_that_are_none(void **state)
{
	refuses("--role|both|--consumer-id|", "--consumer-id: is empty");
	refuses("--role|both|--consumer-id|seq",
	        "--consumer-id: \"seq\" is no part of a message, allowed are \"topic\"");
	refuses("--role|both|--consumer-id|topic,", "--consumer-id: \"\" is no part");
	refuses("--role|both|--consumer-id|[]", "--consumer-id: the list is empty");
	refuses("--role|both|--consumer-id|[\"topic\"", "--consumer-id: is no list in JSON");
	refuses("--role|both|--consumer-id|[\"topic\",5]", "--consumer-id: item 2 of the list is no text in quotes");
	refuses("--role|both|--consumer-id|[\"/a\\u0000b\"]", "--consumer-id: holds a NUL");
	refuses("--role|both|--consumer-id|topic,/topic", "--consumer-id: \"/topic\": another part is named \"topic\"");
	refuses("--role|both|--consumer-id|topic,/$a", "MongoDB takes no field");
	refuses("--role|both|--consumer-id|/a~b", "~0");
	refuses_file("{\n\"consumer\": {\"id\": 5}}",
	             "2: consumer.id: is 5, must be a list of texts in quotes, as in [\"a\", \"b\"]");
	refuses_file("{\"consumer\": {\"id\": {\"a\": [1]}}, \"role\": \"both\"}",
	             "1: consumer.id: is an object, must be a list of texts in quotes, as in [\"a\", \"b\"]");
	refuses_file("{\"consumer\": {\"id\": \"topic\"}}",
	             "1: consumer.id: \"topic\" is neither \"objectid\" nor a list, write [\"topic\"]");
	refuses_file("{\"consumer\": {\n\"id\": [\"topic\",\n[\"/a\"]]}}",
	             "2: consumer.id: item 2 of the list is no text in quotes");
	refuses_file("{\"consumer\": {\"id\": [{\"a\": 1}], \"topic\": \"a\", \"qso\": 1}}",
	             "1: consumer.id: item 1 of the list is no text in quotes");
	assert_says("qso");
	refuses_file("{\"consumer\": {\"id\": [\"/a\\u0000\"]}}",
	             "1: consumer.id: holds a NUL character (\\u0000), take it out");
	refuses("--role|both|--mqtt-protocol|3.1.1|--consumer-id|topic,user-property:id",
	        "--consumer-id: MQTT 3.1.1 has no user properties");
	accepts("--role|both|--mqtt-protocol|3.1.1|--consumer-id|topic,/id");
}

static void write_concern(void **state)
{
	refuses("--role|both|--mongodb-write-concern-w|0",
	        "0 is refused, acknowledging to the broker would promise nothing");
	refuses_file("{\"mongodb\": {\"write_concern\": {\"w\": 0}}}",
	             "1: mongodb.write_concern.w: 0 is refused, acknowledging to the broker would promise nothing; the "
	             "least is 1");
	refuses("--role|both|--mongodb-write-concern-w|00", "is refused");
	refuses("--role|both|--mongodb-write-concern-w|-1", "must be majority, 1 to 50 members");
	warns("--role|both|--mongodb-write-concern-w|1", "--mongodb-write-concern-w: 1 promises less than majority");
	assert_true(config.mongodb.w_set);
	assert_false(config.mongodb.j_set);
	warns("--role|both|--mongodb-write-concern-j=false", "--mongodb-write-concern-j: false promises less");
	assert_true(config.mongodb.j_set);
	accepts("--role|both|--mongodb-write-concern-w|twoDatacenters|--mongodb-write-concern-timeout|1s");
	assert_true(config.mongodb.write_timeout_set);
}

static void uris(void **state)
{
	static const struct {
		const char *uri, *text;
	} BAD[] = {
	    {"localhost:27017", "must start with mongodb:// or mongodb+srv://, as in mongodb://localhost:27017"},
	    {"mongodb://u:s3@cret@h/", "the password has a '@' that is not escaped, write it as %40"},
	    {"mongodb://u:s3:cret@h", "the password has a ':' that is not escaped, write it as %3A"},
	    {"mongodb://u:s3/cret@h", "the password has a '/' that is not escaped, write it as %2F"},
	    {"mongodb://u:12/s3@cret@h", "the password has a '/' that is not escaped"},
	    {"mongodb://u:s3?cret@h", "the password has a '?' that is not escaped"},
	    {"mongodb://u:12?cret@h", "the password has a '?' that is not escaped"},
	    {"mongodb://u:s3?cret=1@h", "the password has a '?' that is not escaped"},
	    {"mongodb://u:s3#cret@h", "the password has a '#' that is not escaped"},
	    {"mongodb://u:s3[cret@h", "the password has a '[' that is not escaped"},
	    {"mongodb://u:s3%cret@h", "the password has a '%' that is not escaped, write it as %25"},
	    {"mongodb://u:s3cret%4@h", "the password has a '%' that is not escaped"},
	    {"mongodb://s3/cret:p@h", "the user name has a '/' that is not escaped"},
	    {"mongodb://u:s3cret", "it may hold a secret and is not shown"},
	    {"mongodb://u:s3cret@h:99999", "Invalid host string"},
	    {"mongodb://h:99999", "Invalid host string"},
	    {"mongodb://h/?w=0", "w=0 in the URI is refused"},
	    {"mongodb://h/?maxPoolSize=abc", "maxpoolsize"},
	    {"mongodb://h:99999/?tlsCertificateKeyFilePassword=s3cret", "it may hold a secret and is not shown"},
	};
	for (size_t i = 0; i < sizeof BAD / sizeof BAD[0]; i++) {
		char variable[200];
		const char *variables[] = {"HOME=/h", variable, NULL};
		snprintf(variable, sizeof variable, "MQTT2MONGO_MONGODB_URI=%s", BAD[i].uri);
		environment = variables;
		refuses("--role|both", BAD[i].text);
		assert_null(strstr(said, "s3"));
		assert_null(strstr(said, "cret@"));
	}
	environment = no_environment;
	accepts("--role|both|--mongodb-uri|mongodb://[::1]:27017,h2:1/?replicaSet=r");
	write_file("a.json", "{\"mongodb\": {\"uri\": \"mongodb://u:p%40@127.0.0.2/?appName=a@b\"}}");
	accepts("--role|both|-c|a.json");
	warns("--role|both|--mongodb-uri|mongodb://h/?w=1&journal=false", "w=1 in the URI promises less than majority");
	assert_says("journal=false in the URI promises less");
	warns("--role|both|--mongodb-uri|mongodb://h/other", "documents go to mongodb.database, now \"mqtt2mongo\"");
	warns("--role|both|--mongodb-uri|mongodb://h/?nonsense=1", "Unsupported URI option \"nonsense\"");
}

static void secrets_in_arguments_are_wiped(void **state)
{
	warns("--role|both|--mqtt-username|u|--mqtt-password|hunter2|--mongodb-uri=mongodb://u:hunter3@h",
	      "--mqtt-password: a secret on the command line can be seen by other users, write it to a file and give "
	      "--mqtt-password-file");
	assert_says(
	    "--mongodb-uri: a secret on the command line can be seen by other users, write it to a file and give "
	    "--mongodb-uri-file");
	assert_null(strstr(said, "hunter"));
	assert_string_equal(arguments[6], "xxxxxxx");
	assert_string_equal(arguments[7], "--mongodb-uri=xxxxxxxxxxxxxxxxxxxxx");
	assert_string_equal(config.mqtt.password, "hunter2");
	assert_string_equal(config.mongodb.uri, "mongodb://u:hunter3@h");
	accepts("--role|both|--mongodb-uri|mongodb://h");
	warns("--role|both|--mqtt-password=a://b", "a secret on the command line");
	assert_string_equal(arguments[3], "--mqtt-password=xxxxx");
}

static void secrets_in_files(void **state)
{
	write_file("password", "hunter2\n\n");
	write_file("uri", "mongodb://u:p%40@localhost\r\n");
	accepts("--role|both|--mqtt-password-file|password|--mongodb-uri-file|uri");
	assert_string_equal(config.mqtt.password, "hunter2\n");
	assert_string_equal(config.mongodb.uri, "mongodb://u:p%40@localhost");
	write_file("uri", "mongodb://u:s3@cret@h\n");
	refuses("--role|both|--mongodb-uri-file|uri", "--mongodb-uri-file: the password has a '@' that is not escaped");
	write_file("uri", "mongodb://h");
	chmod("password", 0640);
	warns("--role|both|--mqtt-password-file|password",
	      "--mqtt-password-file: password can be read by other users: chmod 600 password");
	write_file("empty", "\n");
	refuses("--role|both|--mqtt-password-file|empty", "--mqtt-password-file: empty is empty");
	refuses("--role|both|--mqtt-password-file|none", "--mqtt-password-file: cannot read none: No such file");
	refuses("--role|both|--mqtt-password-file|password|--mqtt-password|x",
	        "--mqtt-password-file: --mqtt-password is set as well, keep one of the two");
	refuses("--role|both|--mongodb-uri-file|uri|--mongodb-uri|mongodb://h", "--mongodb-uri is set as well");
	FILE *file = fopen("nul", "w");
	fwrite("a\0b", 1, 3, file);
	fclose(file);
	refuses("--role|both|--mqtt-password-file|nul", "holds a NUL byte");
	chmod("password", 0600);
	refuses("--role|both|--mqtt-password-file|password|--mqtt-protocol|3.1.1",
	        "--mqtt-password-file: MQTT 3.1.1 has no password without a user name, set mqtt.username");
	accepts("--role|both|--mqtt-password-file|password|--mqtt-protocol|3.1.1|--mqtt-username|u");
}

static void redaction(void **state)
{
	static const char *const PAIRS[][2] = {
	    {"mongodb://localhost:27017", "mongodb://localhost:27017"},
	    {"mongodb://u:p@h/db?x=1", "mongodb://***@h/db?x=1"},
	    {"mongodb://u@h", "mongodb://***@h"},
	    {"mongodb+srv://u:p@x/y@h", "mongodb+srv://***@h"},
	    {"mongodb://u:p@x?y@h", "mongodb://***@h"},
	    {"mongodb://u:secret", "mongodb://***"},
	    {"mongodb://a:1,b:2,[::1]:3/", "mongodb://a:1,b:2,[::1]:3/"},
	    {"mongodb://h/?tlsCertificateKeyFilePassword=s&w=1", "mongodb://h/?tlsCertificateKeyFilePassword=***&w=1"},
	    {"mongodb://h/?authMechanismProperties=AWS_SESSION_TOKEN:s", "mongodb://h/?authMechanismProperties=***"},
	    {"mongodb://u:p@h/?appName=me@plant", "mongodb://***@h/?appName=me@plant"},
	    {"mongodb://u:p@h/?appName=me@plant&tlsCertificateKeyFilePassword=s",
	     "mongodb://***@h/?appName=me@plant&tlsCertificateKeyFilePassword=***"},
	    {"mongodb://h/?appName=@u@&tlsCertificateKeyFilePassword=s@t;x=1",
	     "mongodb://h/?appName=@u@&tlsCertificateKeyFilePassword=***;***"},
	    {"mongodb://u:p==@u.example:10255/?ssl=true&maxIdleTimeMS=120000&appName=@u@",
	     "mongodb://***@u.example:10255/?ssl=true&maxIdleTimeMS=120000&appName=@u@"},
	    {"mongodb://u:p/q==@h:1/?appName=@u@&tlsCertificateKeyFilePassword=s",
	     "mongodb://***@&tlsCertificateKeyFilePassword=***"},
	    {"mongodb://u:p@h/?strange=me@plant", "mongodb://***@plant"},
	    {"mongodb://u:p@x/?y=z@h", "mongodb://***@h"},
	    {"mongodb://h/?tlsCertificateKeyFilePassword=s&t&tls=true",
	     "mongodb://h/?tlsCertificateKeyFilePassword=***&***&tls=true"},
	    {"mongodb://h/?tlsCertificateKeyFilePassword=s&t@u&tls=true", "mongodb://***"},
	    {"mongodb://%2Ftmp%2Fmongodb-27017.sock", "mongodb://%2Ftmp%2Fmongodb-27017.sock"},
	    {"secret", "***"},
	    {"u:p@h", "***"},
	    {"", "***"},
	};
	for (size_t i = 0; i < sizeof PAIRS / sizeof PAIRS[0]; i++) {
		char *shown = config_redact_uri(PAIRS[i][0]);
		assert_string_equal(shown, PAIRS[i][1]);
		free(shown);
	}
}

static uint32_t random_state = 1;

static unsigned random_below(unsigned limit)
{
	random_state = random_state * 1664525 + 1013904223;
	return (random_state >> 8) % limit;
}

/* Append a secret: an ordinary one that is percent-encoded, or one of all characters that mean something in a URI. */
static void put_secret(char *uri, bool encoded)
{
	static const char SPECIAL[] = "Z@:/?#[]%&=;,Z";
	for (unsigned i = 0, length = 1 + random_below(8); i < length; i++) {
		char special[2] = {SPECIAL[random_below(sizeof SPECIAL - 1)]};
		add(uri, URI_SIZE, i == 0 ? "Z" : encoded ? "%5A" : special);
	}
}

/* Append options, and perhaps a secret among them. */
static void put_options(char *uri)
{
	static const char *const OPTIONS[] = {"appName=me@plant",
	                                      "appName=@u@",
	                                      "tls=true",
	                                      "w=majority",
	                                      "authSource=a@b",
	                                      "strange=1",
	                                      "strange=c@d",
	                                      "tlsCertificateKeyFilePassword=",
	                                      "authMechanismProperties=AWS_SESSION_TOKEN:",
	                                      "password=",
	                                      "my_secret="};
	for (unsigned i = 0, count = random_below(5); i < count; i++) {
		const char *option = OPTIONS[random_below(sizeof OPTIONS / sizeof OPTIONS[0])];
		add(uri, URI_SIZE, i == 0 ? "?" : random_below(4) == 0 ? ";" : "&");
		add(uri, URI_SIZE, option);
		if (strpbrk(option + strlen(option) - 1, "=:") != NULL)
			put_secret(uri, false);
	}
}

/* Z and its escape %5A are in secrets only: whatever the URI looks like, none is shown, by the one who shows it or by
 * any complaint. */
static void no_secret_is_shown(void **state)
{
	static const char *const HOSTS[] = {"h", "h:27017", "a:1,b,c:3", "[::1]:2", "%2Ftmp%2Fm.sock", "u.example.org",
	                                    ""};
	char uri[URI_SIZE], *flags;
	unsigned with_secret = 0;
	for (unsigned i = 0; i < 20000; i++) {
		uri[0] = 0;
		add(uri, URI_SIZE, random_below(2) ? "mongodb://" : "mongodb+srv://");
		if (random_below(4) > 0) {
			add(uri, URI_SIZE, "u:");
			put_secret(uri, random_below(2));
			add(uri, URI_SIZE, "@");
		}
		add(uri, URI_SIZE, HOSTS[random_below(sizeof HOSTS / sizeof HOSTS[0])]);
		add(uri, URI_SIZE, random_below(3) == 0 ? "" : random_below(2) ? "/" : "/db");
		put_options(uri);
		with_secret += strchr(uri, 'Z') != NULL;
		char *shown = config_redact_uri(uri), *quoted = config_quote(uri);
		if (strstr(shown, "Z") != NULL || strstr(shown, "5A") != NULL || strstr(quoted, "Z") != NULL)
			fail_msg("%s is shown as %s and %s", uri, shown, quoted);
		free(quoted);
		free(shown);
		if (i % 20 != 0 || strchr(uri, '|') != NULL)
			continue;
		assert_true(asprintf(&flags, "--role|both|--mongodb-uri|%s", uri) > 0);
		load(flags);
		if (strchr(said, 'Z') != NULL || strstr(said, "%5A") != NULL)
			fail_msg("%s makes it say %s", uri, said);
		free(flags);
	}
	assert_true(with_secret > 10000);
}

static void assert_warned(const char *flags, const char *text, bool warned)
{
	assert_int_equal(load(flags), CONFIG_RUN);
	if ((strstr(said, text) != NULL) != warned)
		fail_msg("%s says:\n%s", flags, said);
}

static void passwords_that_others_can_read_along(void **state)
{
	static const char *const OTHERS[] = {"broker",       "10.0.0.1",          "128.0.0.1",   "::2",
	                                     "fe80::1%eth0", "localhost.example", "127.example", "notlocalhost"};
	static const char *const OURS[] = {"localhost", "LOCALHOST", "a.localhost",     "127.0.0.1",
	                                   "127.1.2.3", "::1",       "::ffff:127.0.0.1"};
	char *flags;
	write_file("password", "x");
	for (size_t i = 0; i < 2 * (sizeof OTHERS / sizeof OTHERS[0]); i++) {
		bool tls = i % 2;
		assert_true(asprintf(&flags, "--role|both|--mqtt-password-file|password|--mqtt-host|%s%s",
		                     OTHERS[i / 2], tls ? "|--mqtt-tls-enabled" : "") > 0);
		assert_warned(flags, "--mqtt-password-file: the password goes to ", !tls);
		free(flags);
	}
	for (size_t i = 0; i < sizeof OURS / sizeof OURS[0]; i++) {
		assert_true(asprintf(&flags, "--role|both|--mqtt-password-file|password|--mqtt-host|%s", OURS[i]) > 0);
		accepts(flags);
		free(flags);
	}
	assert_warned("--role|both|--mqtt-host|broker|--mqtt-username|u", "warning", false);

	static const struct {
		const char *uri;
		bool open;
	} URIS[] = {{"mongodb://u:p@db.example", true},
	            {"mongodb://u:p@localhost,db:1/", true},
	            {"mongodb://u:p@db/?tls=false", true},
	            {"mongodb+srv://u:p@db.example.org/?tls=false", true},
	            {"mongodb://u:p@db/?tls=true", false},
	            {"mongodb://u:p@db/?ssl=true", false},
	            {"mongodb+srv://u:p@db.example.org/", false},
	            {"mongodb://db", false},
	            {"mongodb://u:p@localhost", false},
	            {"mongodb://u:p@[::1]:1,127.0.0.1/", false},
	            {"mongodb://u:p@%2Ftmp%2Fmongodb-27017.sock", false},
	            {"mongodb://u@db/?authMechanism=MONGODB-X509", false}};
	for (size_t i = 0; i < sizeof URIS / sizeof URIS[0]; i++) {
		write_file("uri", URIS[i].uri);
		assert_warned("--role|both|--mongodb-uri-file|uri", "is not encrypted", URIS[i].open);
		assert_null(strstr(said, "u:p"));
	}
}

static void tls_that_checks_nothing(void **state)
{
	static const char *const OPTIONS[][2] = {{"tlsInsecure", "tlsInsecure"},
	                                         {"tlsAllowInvalidCertificates", "tlsAllowInvalidCertificates"},
	                                         {"tlsAllowInvalidHostnames", "tlsAllowInvalidHostnames"},
	                                         {"sslAllowInvalidCertificates", "tlsAllowInvalidCertificates"},
	                                         {"sslAllowInvalidHostnames", "tlsAllowInvalidHostnames"}};
	char flags[200], words[100];
	for (size_t i = 0; i < sizeof OPTIONS / sizeof OPTIONS[0]; i++)
		for (int on = 0; on < 2; on++) {
			snprintf(flags, sizeof flags, "--role|both|--mongodb-uri|mongodb://h/?tls=true&%s=%s",
			         OPTIONS[i][0], on ? "true" : "false");
			snprintf(words, sizeof words,
			         "--mongodb-uri: with %s in the URI whoever is on the way can pose as MongoDB",
			         OPTIONS[i][1]);
			assert_warned(flags, words, on);
		}
}

/* Who may read: others never; our group where we have not been given the file by another user. */
static void files_that_others_can_read(void **state)
{
	static const struct {
		mode_t mode;
		bool of_another, open;
	} CASES[] = {{0600, false, false}, {0400, false, false}, {0640, false, true}, {0604, false, true},
	             {0644, false, true},  {0602, false, true},  {0640, true, false}, {0440, true, false},
	             {0644, true, true},   {0777, true, true}};
	static const char *const FLAGS[][2] = {
	    {"--role|both|--mqtt-password-file|secret",
	     "--mqtt-password-file: secret can be read by other users: chmod 6"},
	    {"--role|both|--mongodb-uri-file|uri", "--mongodb-uri-file: uri can be read by other users"},
	    {"--role|both|-c|a.json", "-c: a.json holds a secret and can be read by other users"},
	    {"--role|both|-c|b.json", "-c: b.json holds a secret and can be read by other users"},
	    {"--role|both|-c|c.json", "can be read by other users"}, /* never: there is none in it */
	    {"--role|both|--mqtt-tls-enabled|--mqtt-tls-cert|secret|--mqtt-tls-key|secret",
	     "--mqtt-tls-key: secret can be read"},
	    {"--role|both|--mongodb-uri|mongodb://h/?tls=true&tlsCertificateKeyFile=secret",
	     "--mongodb-uri: secret can be read"}};
	static const char *const FILES[] = {"secret", "uri", "a.json", "b.json", "c.json"};
	write_file("secret", "x");
	write_file("uri", "mongodb://h");
	write_file("a.json", "{\"mqtt\": {\"password\": \"x\"}}");
	write_file("b.json", "{\"mongodb\": {\"uri\": \"mongodb://u:p@localhost\"}}");
	write_file("c.json", "{\"mongodb\": {\"uri\": \"mongodb://localhost\"}, \"mqtt\": {\"username\": \"u\"}}");
	for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
		if (CASES[i].of_another && geteuid() != 0)
			continue; /* only root can give a file away */
		for (size_t k = 0; k < sizeof FILES / sizeof FILES[0]; k++) {
			chmod(FILES[k], CASES[i].mode);
			assert_true(geteuid() != 0 || chown(FILES[k], CASES[i].of_another ? 65534 : 0, getegid()) == 0);
		}
		for (size_t k = 0; k < sizeof FLAGS / sizeof FLAGS[0]; k++)
			assert_warned(FLAGS[k][0], FLAGS[k][1], CASES[i].open && k != 4);
	}
	for (size_t k = 0; k < sizeof FILES / sizeof FILES[0]; k++)
		unlink(FILES[k]);
}

static void state_directory(void **state)
{
	const char *systemd[] = {"STATE_DIRECTORY=/var/lib/a:/var/lib/b", "HOME=/h", NULL};
	const char *xdg[] = {"XDG_STATE_HOME=/x", "HOME=/h", NULL};
	const char *relative[] = {"XDG_STATE_HOME=x", "HOME=/h", NULL};
	const char *none[] = {NULL};
	bool system_wide = access("/var/lib/mqtt2mongo", W_OK) == 0 ||
	                   (access("/var/lib/mqtt2mongo", F_OK) != 0 && access("/var/lib", W_OK) == 0);
	environment = systemd;
	accepts("--role|both");
	assert_string_equal(config.state_dir, "/var/lib/a");
	accepts("--role|both|--state-dir|here");
	assert_string_equal(config.state_dir, "here");
	environment = xdg;
	accepts("--role|both");
	assert_string_equal(config.state_dir, system_wide ? "/var/lib/mqtt2mongo" : "/x/mqtt2mongo");
	environment = relative;
	accepts("--role|both");
	assert_string_equal(config.state_dir, system_wide ? "/var/lib/mqtt2mongo" : "/h/.local/state/mqtt2mongo");
	environment = none;
	if (system_wide)
		accepts("--role|both");
	else
		refuses("--role|both", "state_dir: no place found");
}

static unsigned count(const char *text, const char *part)
{
	unsigned found = 0;
	for (; (text = strstr(text, part)) != NULL; text++)
		found++;
	return found;
}

static void documents_hold_every_key(void **state)
{
	static const struct {
		const char *flag, *form;
	} DOCUMENTS[] = {{"--help", " %s\n      "}, {"--man", "\n\\fB%s\\fR\n"}, {"--markdown", "| `%s` |"}};
	for (size_t i = 0; i < sizeof DOCUMENTS / sizeof DOCUMENTS[0]; i++) {
		assert_silent(CONFIG_PRINTED, load(DOCUMENTS[i].flag));
		for (size_t j = 0; j < config_entry_count; j++) {
			char part[100];
			int length = snprintf(part, sizeof part, DOCUMENTS[i].form, config_entries[j].key);
			assert_in_range(length, 1, sizeof part - 1);
			if (count(printed, part) != 1)
				fail_msg("%s holds %s %u times", DOCUMENTS[i].flag, part, count(printed, part));
		}
	}
	assert_silent(CONFIG_PRINTED, load("--nonsense|-h"));
	assert_non_null(strstr(printed, "--mqtt-tls-ca"));
}

static void where_to_listen(void **state)
{
	accepts("--role|both");
	assert_false(config.http.enabled);
	accepts("--role|both|--http-listen|off");
	assert_false(config.http.enabled);
	static const struct {
		const char *flags, *address;
		int port;
	} good[] = {{"--role|both|--http-listen|127.0.0.1:9641", "127.0.0.1", 9641},
	            {"--role|both|--http-listen|localhost:1", "127.0.0.1", 1},
	            {"--role|both|--http-listen|[::1]:65535", "::1", 65535}};
	for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
		accepts(good[i].flags);
		assert_true(config.http.enabled);
		assert_string_equal(config.http.address, good[i].address);
		assert_int_equal(config.http.port, good[i].port);
	}
	warns("--role|both|--http-listen|0.0.0.0:80", "127.0.0.1:80 serves this machine only");
	assert_string_equal(config.http.address, "0.0.0.0");
	warns("--role|both|--http-listen|[::]:9641", "--http-listen: whoever reaches this address");

	static const char *const ports[] = {
	    "9641",        ":9641",        "127.0.0.1",       "127.0.0.1:",   "127.0.0.1:0",
	    "127.0.0.1:x", "127.0.0.1:-1", "127.0.0.1:65536", "127.0.0.1:1 ", "on"};
	static const char *const names[] = {"host:80", "*:80", "1.2.3:80", "[127.0.0.1]:80",
	                                    "[]:80",   "]:80", "[::g]:80"};
	char flags[512];
	for (size_t i = 0; i < sizeof ports / sizeof *ports; i++) {
		snprintf(flags, sizeof flags, "--role|both|--http-listen|%s", ports[i]);
		refuses(flags, "--http-listen: must be off, or an address and a port from 1 to 65535");
	}
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		snprintf(flags, sizeof flags, "--role|both|--http-listen|%s", names[i]);
		refuses(flags, "--http-listen: needs an address of this machine, not a name: 127.0.0.1");
	}
	snprintf(flags, sizeof flags, "--role|both|--http-listen|%0300d:80", 0);
	refuses(flags, "needs an address of this machine");
	refuses("--role|both|--http-listen|http://127.0.0.1:80/", "is a URL, write address and port only");
	refuses("--role|both|--http-listen|::1:80", "write an IPv6 address in brackets, as in [::1]:9641");
	refuses("--role|both|--http-listen|[::1:80", "has no ] before the port");
	refuses_file("{ \"http\": { \"listen\": 9641 } }", "1: http.listen: is 9641, must be a text in quotes");
}

static void names_to_be_asked_by(void **state)
{
	accepts("--role|both|--http-hosts|status.example.org,plant7");
	assert_int_equal(config.http.hosts.count, 2);
	assert_string_equal(config.http.hosts.items[1], "plant7");
	write_file("a.json", "{\"http\": {\"hosts\": [\"status.example.org\"]}}");
	accepts("--role|both|-c|a.json");
	assert_string_equal(config.http.hosts.items[0], "status.example.org");
	refuses_file("{\"http\": {\"hosts\": \"plant7\"}}",
	             "1: http.hosts: \"plant7\" is not a list, write [\"plant7\"]");
	refuses("--role|both|--http-hosts|a,http://b", "--http-hosts: give names only, as in status.example.org");
	refuses("--role|both|--http-hosts|a:9641", "--http-hosts: give names only");
	refuses("--role|both|--http-hosts|*.example.org", "--http-hosts: * stands for nothing here");
	refuses("--role|both|--http-hosts|a b", "--http-hosts: must be a list of host names");
	refuses("--role|both|--http-hosts|a|--http-hosts|b", "--http-hosts: is given twice, give all names in one");
}

static void version(void **state)
{
	assert_silent(CONFIG_PRINTED, load("--version"));
	assert_memory_equal(printed, "mqtt2mongo ", 11);
	assert_non_null(strstr(printed, "\nlibuv "));
	assert_non_null(strstr(printed, "\nlibmosquitto 2."));
	assert_non_null(strstr(printed, "\nlibmongoc "));
}

/* The table's own defaults and limits are valid values of their type. */
static void the_table_is_sound(void **state)
{
	for (size_t i = 0; i < config_entry_count; i++) {
		const struct config_entry *entry = &config_entries[i];
		const char *const texts[] = {entry->initial, entry->least, entry->most};
		assert_int_equal(entry->least == NULL, entry->most == NULL);
		for (size_t j = 0; j < 3; j++) {
			struct config_value value;
			if (texts[j] != NULL)
				assert_null(config_value_parse(entry, CONFIG_KIND_PLAIN, texts[j], &value));
		}
	}
}

/* Run groff with all warnings, its output to page.txt and complaints. 127: there is no groff. */
static int run_groff(void)
{
	int status = 0;
	pid_t child = fork();
	if (child == 0) {
		if (freopen("page.txt", "w", stdout) != NULL && freopen("complaints", "w", stderr) != NULL)
			execlp("groff", "groff", "-ww", "-man", "-Tascii", "page.1", (char *)NULL);
		_exit(127);
	}
	assert_true(child > 0);
	assert_int_equal(waitpid(child, &status, 0), child);
	return WEXITSTATUS(status);
}

static void the_manual_page_is_clean(void **state)
{
	assert_silent(CONFIG_PRINTED, load("--man"));
	write_file("page.1", printed);
	int result = run_groff();
	if (result == 127)
		skip();
	struct stat status;
	assert_int_equal(result, 0);
	assert_int_equal(stat("complaints", &status), 0);
	assert_int_equal(status.st_size, 0);
}

static const char *source_root(void)
{
	const char *root = getenv("MQTT2MONGO_SOURCE_ROOT");
#ifdef MQTT2MONGO_SOURCE_ROOT
	root = root != NULL ? root : MQTT2MONGO_SOURCE_ROOT;
#endif
	return root;
}

/* The example loads in silence and shows the defaults: every value in it is the one a start without it would have. */
static void the_example_loads(void **state)
{
	if (source_root() == NULL)
		skip();
	char *flags;
	assert_true(asprintf(&flags, "-c|%s/config/mqtt2mongo.json", source_root()) > 0);
	accepts(flags);
	free(flags);
	for (size_t i = 0; i < config_entry_count; i++) {
		const struct config_entry *entry = &config_entries[i];
		struct config_value value;
		if (entry->initial == NULL)
			continue;
		assert_null(config_value_parse(entry, CONFIG_KIND_PLAIN, entry->initial, &value));
		const void *place = (const char *)&config + entry->offset;
		if (entry->type == CONFIG_TYPE_TEXT || entry->type == CONFIG_TYPE_CONCERN)
			assert_string_equal(*(char *const *)place, entry->initial);
		else if (entry->type == CONFIG_TYPE_INTEGER || entry->type == CONFIG_TYPE_CHOICE)
			assert_int_equal(*(const int *)place, value.integer);
		else if (entry->type == CONFIG_TYPE_BOOLEAN)
			assert_int_equal(*(const bool *)place, value.yes);
		else if (entry->type == CONFIG_TYPE_LIST)
			assert_string_equal(((const struct config_list *)place)->items[0], entry->initial);
		else if (entry->type != CONFIG_TYPE_RATE && entry->type != CONFIG_TYPE_SEED)
			assert_int_equal(*(const int64_t *)place, value.integer);
	}
	assert_false(config.publisher.seed_set);
}

static void finishing_nothing(void **state)
{
	struct config zeroed = {0};
	config_finish(&zeroed);
	config_finish(&zeroed);
}

static int enter_directory(void **state)
{
	static char path[] = "/tmp/test_config.XXXXXX";
	return mkdtemp(path) == NULL || chdir(path) != 0;
}

static int leave_directory(void **state)
{
	static const char *const FILES[] = {"a.json", "pem",    "password", "uri",       "empty",
	                                    "nul",    "page.1", "page.txt", "complaints"};
	char *path = get_current_dir_name();
	for (size_t i = 0; i < sizeof FILES / sizeof FILES[0]; i++)
		unlink(FILES[i]);
	int result = chdir("/") != 0 || rmdir(path) != 0;
	free(path);
	return result;
}

#define TEST(function) cmocka_unit_test_teardown(function, finish)

int main(void)
{
	const struct CMUnitTest tests[] = {
	    TEST(defaults),
	    TEST(precedence),
	    TEST(losing_values_are_checked_too),
	    TEST(all_errors_are_said),
	    TEST(role_is_missing),
	    TEST(complaints_as_json),
	    TEST(complaints_are_escaped),
	    TEST(actions),
	    TEST(replaying),
	    TEST(durations),
	    TEST(sizes),
	    TEST(rates_and_numbers),
	    TEST(booleans),
	    TEST(broken_flags),
	    TEST(synonyms),
	    TEST(broken_environment),
	    TEST(comments),
	    TEST(syntax_errors_have_a_place),
	    TEST(wrong_types),
	    TEST(numbers_in_the_file),
	    TEST(hosts),
	    TEST(identity),
	    TEST(topics),
	    TEST(filters_that_meet),
	    TEST(filters_meet_where_a_topic_matches_both),
	    TEST(one_filter_and_one_collection),
	    TEST(share_groups),
	    TEST(mongodb_names),
	    TEST(crossed_values),
	    TEST(tls),
	    TEST(ids),
	    TEST(ids_that_are_none),
	    TEST(write_concern),
	    TEST(uris),
	    TEST(secrets_in_arguments_are_wiped),
	    TEST(secrets_in_files),
	    TEST(redaction),
	    TEST(no_secret_is_shown),
	    TEST(passwords_that_others_can_read_along),
	    TEST(tls_that_checks_nothing),
	    TEST(files_that_others_can_read),
	    TEST(state_directory),
	    TEST(documents_hold_every_key),
	    TEST(where_to_listen),
	    TEST(names_to_be_asked_by),
	    TEST(version),
	    TEST(the_table_is_sound),
	    TEST(the_manual_page_is_clean),
	    TEST(the_example_loads),
	    TEST(finishing_nothing),
	};
	return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}
