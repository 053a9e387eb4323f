/*
 * The documents made from the table: --help, the man page in troff, the README's table in Markdown, and --version.
 * Start-up only. Each prints to a stream and has no other effect.
 */
#include "config_table.h"

#include "build.h"
#include "memory.h"

#include <mongoc/mongoc.h>
#include <mosquitto.h>
#include <sqlite3.h>
#include <stdlib.h>
#include <string.h>
#include <uv.h>

enum { TEXT_WIDTH = 92, INDENT = 6, KEY_COLUMN = 60 };

static const char SUMMARY[] =
    "stores messages from an MQTT broker in MongoDB and acknowledges each only when it is stored";

/* Flags that are no keys: name, what it does. */
static const struct {
	const char *flag, *help;
} ACTIONS[] = {
    {"-c, --config FILE",
     "read settings from FILE, which is JSON with // and /* */ comments; one object for each section, "
     "as in {\"mqtt\": {\"host\": \"broker\"}}; file names in it are relative to the current directory"},
    {"--check", "check the settings, then try broker and database and say what would be done"},
    {"--dry-run", "print documents instead of storing them; acknowledge nothing"},
    {"--spool-status",
     "print how many messages the spool holds, how large it is and how old the oldest is; also beside a "
     "running service"},
    {"--spool-export",
     "print the messages of the spool, one line of canonical extended JSON each, and leave them there; "
     "also beside a running service"},
    {"--version", "print the version, also of the libraries"},
    {"-h, --help", "print this text"},
    {"--man", "print the manual page: mqtt2mongo --man | man -l -"},
    {"--markdown", "print the settings as a table in Markdown"},
};

static const struct {
	const char *title, *command;
} EXAMPLES[] = {
    {"publish ten generated messages a second", "mqtt2mongo --role publisher --mqtt-host broker --publisher-rate 10/s"},
    {"store what arrives below sensors/", "mqtt2mongo --role consumer --mqtt-host broker --consumer-topic 'sensors/#'"},
    {"both at once, settings from a file", "mqtt2mongo --role both -c mqtt2mongo.json"},
};

static const char RULES[] = "A flag beats the environment, which beats the file, which beats the default. "
			    "Durations need a unit (ms, s, min, h, d), sizes too (B, KiB, MiB, GiB).";

static const char SPELLINGS[] =
    "Settings, each as a flag and, on the right, as a key of the file; the environment variable "
    "is the key in capitals behind MQTT2MONGO_, as in MQTT2MONGO_MQTT_TLS_CA.";

/* What stands behind the flag. */
static const char *placeholder(const struct config_entry *entry)
{
	switch (entry->type) {
	case CONFIG_TYPE_BOOLEAN:
		return "[true|false]";
	case CONFIG_TYPE_INTEGER:
	case CONFIG_TYPE_COUNT:
	case CONFIG_TYPE_SEED:
		return "NUMBER";
	case CONFIG_TYPE_DURATION:
	case CONFIG_TYPE_SECONDS:
		return "DURATION";
	case CONFIG_TYPE_SIZE:
		return "SIZE";
	case CONFIG_TYPE_RATE:
		return "RATE";
	case CONFIG_TYPE_LIST:
		return "LIST";
	default:
		return "TEXT";
	}
}

/* The choices joined by `separator`, or the range, or "". Allocated. */
static char *allowed(const struct config_entry *entry, const char *separator)
{
	char *text = entry->least != NULL ? memory_format("%s to %s", entry->least, entry->most) : memory_string("");
	for (const struct config_choice *choice = entry->choices; choice != NULL && choice->name != NULL; choice++) {
		char *longer = memory_format("%s%s%s", text, text[0] != '\0' ? separator : "", choice->name);
		free(text);
		text = longer;
	}
	return text;
}

static const char *shown_default(const struct config_entry *entry)
{
	return entry->initial_note != NULL ? entry->initial_note : entry->initial;
}

/* Print words, broken so that no line is longer than the page. */
static void print_wrapped(FILE *output, int indent, const char *text)
{
	size_t column = (size_t)indent;
	fprintf(output, "%*s", indent, "");
	while (*text != '\0') {
		size_t length = strcspn(text, " ");
		bool starts_line = column == (size_t)indent;
		if (!starts_line && column + length > TEXT_WIDTH) {
			fprintf(output, "\n%*s", indent, "");
			column = (size_t)indent;
			starts_line = true;
		}
		fprintf(output, "%s%.*s", starts_line ? "" : " ", (int)length, text);
		column += length + 1;
		text += length + (text[length] == ' ');
	}
	fputc('\n', output);
}

static void print_help_entry(FILE *output, const struct config_entry *entry)
{
	char *name = config_spell(CONFIG_SOURCE_FLAG, entry->key), *range = allowed(entry, ", ");
	char *flag = memory_format("  %s %s", name, placeholder(entry));
	const char *initial = shown_default(entry);
	char *text = memory_format("%s%s%s%s%s%s", entry->help, range[0] != '\0' ? "; allowed: " : "", range,
	                           initial != NULL ? " (default: " : "", initial != NULL ? initial : "",
	                           initial != NULL ? ")" : "");
	fprintf(output, "%-*s %s\n", KEY_COLUMN, flag, entry->key);
	print_wrapped(output, INDENT, text);
	free(text);
	free(flag);
	free(range);
	free(name);
}

void config_print_help(FILE *output)
{
	fprintf(output,
	        "mqtt2mongo %s\n\nUsage: mqtt2mongo --role publisher|consumer|both [-c FILE] [--KEY VALUE …]\n\n",
	        SUMMARY);
	for (size_t i = 0; i < sizeof EXAMPLES / sizeof EXAMPLES[0]; i++)
		fprintf(output, "  # %s\n  %s\n", EXAMPLES[i].title, EXAMPLES[i].command);
	fprintf(output, "\n");
	for (size_t i = 0; i < sizeof ACTIONS / sizeof ACTIONS[0]; i++) {
		fprintf(output, "  %s\n", ACTIONS[i].flag);
		print_wrapped(output, INDENT, ACTIONS[i].help);
	}
	fputc('\n', output);
	print_wrapped(output, 0, SPELLINGS);
	print_wrapped(output, 0, RULES);
	fputc('\n', output);
	for (size_t i = 0; i < config_entry_count; i++)
		print_help_entry(output, &config_entries[i]);
	fprintf(output, "\nExit status: 0 well, 1 failed or something is missing, 2 the configuration is wrong.\n");
}

/* Text for troff: a backslash, a hyphen-minus, and a dot or quote at the start of a line would be commands. */
static void print_troff(FILE *output, const char *text)
{
	if (*text == '.' || *text == '\'')
		fputs("\\&", output);
	for (; *text != '\0'; text++) {
		if (strncmp(text, "…", strlen("…")) == 0) {
			fputs("...", output);
			text += strlen("…") - 1;
		} else if (*text == '\\') {
			fputs("\\e", output);
		} else if (*text == '-') {
			fputs("\\-", output);
		} else if (*text == '\'') {
			fputs("\\(aq", output);
		} else if (*text == '~') {
			fputs("\\(ti", output);
		} else {
			fputc(*text, output);
		}
	}
}

static void print_troff_line(FILE *output, const char *before, const char *text, const char *after)
{
	fputs(before, output);
	print_troff(output, text);
	fputs(after, output);
	fputc('\n', output);
}

static void print_man_entry(FILE *output, const struct config_entry *entry)
{
	char *flag = config_spell(CONFIG_SOURCE_FLAG, entry->key), *range = allowed(entry, ", ");
	char *variable = config_spell(CONFIG_SOURCE_ENVIRONMENT, entry->key);
	fputs(".TP\n", output);
	print_troff_line(output, "\\fB", entry->key, "\\fR");
	print_troff_line(output, "", entry->help, ".");
	if (range[0] != '\0')
		print_troff_line(output, "Allowed: ", range, ".");
	if (shown_default(entry) != NULL)
		print_troff_line(output, "Default: ", shown_default(entry), ".");
	fputs(".br\n", output);
	print_troff_line(output, "\\fB", flag, "\\fR,");
	print_troff_line(output, "\\fB", variable, "\\fR");
	free(variable);
	free(range);
	free(flag);
}

static void print_man_options(FILE *output)
{
	fputs(".SH OPTIONS\n", output);
	for (size_t i = 0; i < sizeof ACTIONS / sizeof ACTIONS[0]; i++) {
		fputs(".TP\n", output);
		print_troff_line(output, "\\fB", ACTIONS[i].flag, "\\fR");
		print_troff_line(output, "", ACTIONS[i].help, ".");
	}
	fputs(".TP\n\\fB\\-\\-\\fISECTION\\-NAME\\fR \\fIVALUE\\fR\nAny setting below; a setting that is true or false "
	      "may "
	      "stand alone and then is true.\n",
	      output);
}

void config_print_man(FILE *output)
{
	fprintf(output, ".TH MQTT2MONGO 1 \"\" \"mqtt2mongo %s\"\n.SH NAME\nmqtt2mongo \\- %s\n", MQTT2MONGO_VERSION,
	        SUMMARY);
	fputs(".SH SYNOPSIS\n\\fBmqtt2mongo\\fR \\fB\\-\\-role\\fR publisher|consumer|both [\\fB\\-c\\fR \\fIFILE\\fR] "
	      "[\\fB\\-\\-\\fISECTION\\-NAME\\fR \\fIVALUE\\fR ...]\n",
	      output);
	print_man_options(output);
	fprintf(output, ".SH SETTINGS\nEach has a key in the file, a flag and an environment variable.\n%s\n", RULES);
	for (size_t i = 0; i < config_entry_count; i++)
		print_man_entry(output, &config_entries[i]);
	fputs(".SH SIGNALS\nSIGTERM and SIGINT store what is on its way and end the service; a second one ends it at "
	      "once. SIGUSR1 prints the sums. SIGHUP is ignored.\n.SH EXIT STATUS\n.TP\n0\nended as it "
	      "should.\n.TP\n1\nsomething failed or is missing.\n.TP\n2\nthe "
	      "configuration is wrong; standard error says where.\n.SH EXAMPLES\n",
	      output);
	for (size_t i = 0; i < sizeof EXAMPLES / sizeof EXAMPLES[0]; i++) {
		fputs(".TP\n", output);
		print_troff_line(output, "", EXAMPLES[i].title, "");
		print_troff_line(output, "\\fB", EXAMPLES[i].command, "\\fR");
	}
	fputs(".SH SEE ALSO\n.BR mosquitto.conf (5),\n.BR mongod (1)\n", output);
}

/* Cell text: a bar would end the cell. */
static void print_cell(FILE *output, const char *text)
{
	for (; *text != '\0'; text++) {
		if (*text == '|')
			fputc('\\', output);
		fputc(*text, output);
	}
}

void config_print_markdown(FILE *output)
{
	fputs("| key | default | allowed | what it is for |\n|---|---|---|---|\n", output);
	for (size_t i = 0; i < config_entry_count; i++) {
		const struct config_entry *entry = &config_entries[i];
		const char *initial = shown_default(entry);
		char *range = allowed(entry, ", ");
		bool literal = entry->initial_note == NULL && initial != NULL;
		fprintf(output, "| `%s` | %s", entry->key, literal ? "`" : "");
		print_cell(output, initial != NULL ? initial : "–");
		fprintf(output, "%s | ", literal ? "`" : "");
		print_cell(output, range);
		fputs(" | ", output);
		print_cell(output, entry->help);
		fputs(" |\n", output);
		free(range);
	}
}

void config_print_version(FILE *output)
{
	int major, minor, revision;
	mosquitto_lib_version(&major, &minor, &revision);
	fprintf(output, "mqtt2mongo %s\nlibuv %s\nlibmosquitto %d.%d.%d\nlibmongoc %s\nsqlite %s\n", MQTT2MONGO_VERSION,
	        uv_version_string(), major, minor, revision, mongoc_get_version(), sqlite3_libversion());
	if (MQTT2MONGO_GATE_OPEN)
		fputs("WARNING: THIS BUILD ACKNOWLEDGES MESSAGES BEFORE THEY ARE STORED AND LOSES THEM IN A CRASH.\n"
		      "It exists for tests only; build with -Dgate=closed.\n",
		      output);
}
