/*
 * The MongoDB connection string: what is wrong with it, said without giving away what it may hold.
 *
 * The driver's own messages quote the user name and password. So the credentials are checked here first, and the
 * driver sees the string with them replaced: what it then complains about cannot contain them.
 */
#define _GNU_SOURCE
#include "config_table.h"

#include "memory.h"

#include <ctype.h>
#include <mongoc/mongoc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

/* Options whose values are secrets: any whose name contains one of these. */
static const char *const SECRET_OPTIONS[] = {"password", "authmechanismproperties", "token", "secret"};

/* Options with texts as values that the driver keeps outside its lists. */
static const char *const OTHER_OPTIONS[] = {
    "authmechanism", "authsource", "compressors", "gssapiservicename", "readconcernlevel", "readpreferencetags", "w"};

/* One option of a URI; its text starts with what stands before it: '?', '&' or ';'. */
struct option {
	const char *text;
	size_t length;
	size_t name; /* length of separator and name; `length` when there is no '=' */
};

static struct option option_at(const char *text)
{
	struct option option = {text, 1 + strcspn(text + 1, "?&;"), strcspn(text, "=")};
	if (option.name > option.length)
		option.name = option.length;
	return option;
}

static bool names_secret(const char *name)
{
	for (size_t i = 0; i < sizeof SECRET_OPTIONS / sizeof SECRET_OPTIONS[0]; i++)
		if (strcasestr(name, SECRET_OPTIONS[i]) != NULL)
			return true;
	return false;
}

/* The driver has such an option. */
static bool names_option(const char *name)
{
	for (size_t i = 0; i < sizeof OTHER_OPTIONS / sizeof OTHER_OPTIONS[0]; i++)
		if (strcasecmp(name, OTHER_OPTIONS[i]) == 0)
			return true;
	return mongoc_uri_option_is_utf8(name) || mongoc_uri_option_is_bool(name) || mongoc_uri_option_is_int32(name) ||
	       mongoc_uri_option_is_int64(name);
}

enum option_kind { OPTION_UNKNOWN, OPTION_KNOWN, OPTION_SECRET };

static enum option_kind kind_of(const struct option *option)
{
	char *name = memory_format("%.*s", (int)(option->name - 1), option->text + 1);
	enum option_kind kind = option->name == option->length ? OPTION_UNKNOWN
	                        : names_secret(name)           ? OPTION_SECRET
	                        : names_option(name)           ? OPTION_KNOWN
	                                                       : OPTION_UNKNOWN;
	memory_wipe_free(name);
	return kind;
}

/* A copy of what follows the credentials, the values of secret options replaced by ***. What follows a secret and is no
 * option is taken for more of it; a name with an escape in it is not read and may be a secret's. */
static char *hide_options(const char *rest)
{
	char *shown = memory_zeroed(1, strlen(rest) * 4 + 1);
	size_t used = strcspn(rest, "?&;");
	bool hidden = false;
	memcpy(shown, rest, used);
	for (const char *next = rest + used; *next != '\0';) {
		struct option option = option_at(next);
		enum option_kind kind = kind_of(&option);
		bool escaped = memchr(option.text, '%', option.name) != NULL;
		hidden = kind == OPTION_SECRET || (kind == OPTION_UNKNOWN && (hidden || escaped));
		size_t kept = !hidden ? option.length : kind == OPTION_SECRET ? option.name + 1 : 1;
		used += (size_t)sprintf(shown + used, "%.*s%s", (int)kept, option.text, hidden ? "***" : "");
		next += option.length;
	}
	return shown;
}

/* Text without '@' that is no host list: perhaps credentials whose host was forgotten. */
static bool is_host_list(const char *text)
{
	size_t length = strcspn(text, "/?");
	for (size_t i = 0; i < length; i++) {
		if (text[i] == '[')
			i += strcspn(text + i, "]");
		else if (text[i] == ':' && text[i + 1 + strspn(text + i + 1, "0123456789")] != ',' &&
		         i + 1 + strspn(text + i + 1, "0123456789") != length)
			return false;
	}
	return true;
}

/* Every '@' of this text, which starts behind the hosts, belongs to the value of an option. */
static bool only_options_hold_at(const char *text)
{
	text += strcspn(text, "@?");
	while (*text != '\0' && *text != '@') {
		struct option option = option_at(text);
		bool unknown = kind_of(&option) == OPTION_UNKNOWN;
		if (memchr(text, '@', unknown ? option.length : option.name) != NULL)
			return false;
		text += option.length;
	}
	return *text == '\0';
}

/*
 * It is the last one before path and options. A '/' or '?' that should have been encoded hides it behind what looks
 * like those; so when there is a later one that no known option explains, that is taken: better a host hidden than a
 * secret shown.
 */
const char *config_credentials_end(const char *rest)
{
	size_t authority = strcspn(rest, "/?");
	const char *at = memrchr(rest, '@', authority), *later = strrchr(rest + authority, '@');
	bool explained = is_host_list(at != NULL ? at + 1 : rest) && only_options_hold_at(rest + authority);
	return later == NULL || explained ? at : later;
}

char *config_redact_uri(const char *uri)
{
	const char *scheme = uri != NULL ? strstr(uri, "://") : NULL;
	if (scheme == NULL)
		return memory_string("***");
	const char *rest = scheme + 3, *end = config_credentials_end(rest);
	char *before = memory_format("%.*s", end != NULL ? (int)(end - rest) : 0, rest);
	bool in_secret = strchr(before, '?') != NULL && names_secret(before); /* the '@' may be a secret option's */
	memory_wipe_free(before);
	if (in_secret || (end == NULL && !is_host_list(rest)))
		return memory_format("%.*s***", (int)(rest - uri), uri);
	char *options = hide_options(end != NULL ? end + 1 : rest);
	char *shown = memory_format("%.*s%s%s", (int)(rest - uri), uri, end != NULL ? "***@" : "", options);
	memory_wipe_free(options);
	return shown;
}

bool config_uri_is_harmless(const char *uri)
{
	char *shown = config_redact_uri(uri);
	bool harmless = strncmp(uri, "mongodb", 7) == 0 && strcmp(shown, uri) == 0;
	memory_wipe_free(shown);
	return harmless;
}

/* The first byte of `text` that must be percent-encoded, or NULL. */
static const char *find_unescaped(const char *text, size_t length)
{
	for (size_t i = 0; i < length; i++) {
		bool escape = text[i] == '%' && i + 2 < length && isxdigit((unsigned char)text[i + 1]) &&
		              isxdigit((unsigned char)text[i + 2]);
		if (strchr("@:/?#[]", text[i]) != NULL || (text[i] == '%' && !escape))
			return text + i;
	}
	return NULL;
}

/* Where the URI came from, for messages. */
static const char *uri_place(const struct config_loader *loader)
{
	bool from_file = config_is_set(loader, "mongodb.uri_file");
	return config_place(loader, from_file ? "mongodb.uri_file" : "mongodb.uri");
}

/* Complain about a character of the credentials that is not encoded. */
static bool check_credentials(struct config_loader *loader, const char *rest, const char *end)
{
	const char *colon = memchr(rest, ':', (size_t)(end - rest));
	const char *user_end = colon != NULL ? colon : end;
	const char *bad = find_unescaped(rest, (size_t)(user_end - rest));
	if (bad == NULL && colon != NULL)
		bad = find_unescaped(colon + 1, (size_t)(end - colon - 1));
	if (bad == NULL)
		return true;
	config_error(loader,
	             "%s: the %s has a '%c' that is not escaped, write it as %%%02X (@ : / ? # [ ] %% must be "
	             "percent-encoded)",
	             uri_place(loader), bad < user_end ? "user name" : "password", *bad, *bad);
	return false;
}

/* The string with other credentials, for the driver to judge. Allocated; secret options stay. */
static char *harmless_copy(const char *uri, const char *rest, const char *end)
{
	bool password = end != NULL && memchr(rest, ':', (size_t)(end - rest)) != NULL;
	return memory_format("%.*s%s%s", (int)(rest - uri), uri,
	                     end == NULL ? ""
	                     : password  ? "user:password@"
	                                 : "user@",
	                     end != NULL ? end + 1 : rest);
}

/* The driver's warnings, for example about an option it does not know, become ours. */
static void take_driver_warning(mongoc_log_level_t level, const char *domain, const char *message, void *user)
{
	struct config_loader *loader = user;
	if (level == MONGOC_LOG_LEVEL_WARNING)
		config_warning(loader, "%s: %.*s", uri_place(loader), (int)strcspn(message, "\n"), message);
}

static void ignore_driver(mongoc_log_level_t level, const char *domain, const char *message, void *user)
{
}

/* Weaker promises made inside the string; an explicit key is checked elsewhere and beats it. */
static void check_uri_concern(struct config_loader *loader, const mongoc_uri_t *uri)
{
	const char *place = uri_place(loader);
	const mongoc_write_concern_t *concern = mongoc_uri_get_write_concern(uri);
	int32_t w = mongoc_write_concern_get_w(concern);
	if (w == 0 || w == -1)
		config_error(loader,
		             "%s: w=%d in the URI is refused, acknowledging to the broker would promise "
		             "nothing; take it out",
		             place, (int)w);
	if (w > 0 && !config_is_set(loader, "mongodb.write_concern.w"))
		config_warning(loader,
		               "%s: w=%d in the URI promises less than majority: a stored message can be "
		               "rolled back when the primary fails",
		               place, (int)w);
	if (mongoc_write_concern_journal_is_set(concern) && !mongoc_write_concern_get_journal(concern) &&
	    !config_is_set(loader, "mongodb.write_concern.j"))
		config_warning(loader,
		               "%s: journal=false in the URI promises less than the default: a stored message "
		               "can be lost when the database crashes",
		               place);
	const char *database = mongoc_uri_get_database(uri);
	if (database != NULL && !config_is_set(loader, "mongodb.database"))
		config_warning(loader,
		               "%s: the database in the URI only serves authentication; documents go to "
		               "mongodb.database, now \"%s\"",
		               place, loader->config->mongodb.database);
}

/* A host that is reached over a network, or NULL. Of mongodb+srv:// none is known yet. */
static const char *remote_host(const mongoc_uri_t *uri)
{
	const mongoc_host_list_t *host = mongoc_uri_get_hosts(uri);
	if (host == NULL)
		return "the servers";
	for (; host != NULL; host = host->next)
		if (host->family != AF_UNIX && !config_is_loopback(host->host))
			return host->host;
	return NULL;
}

/* What lets others read along or pose as MongoDB. */
static void check_uri_privacy(struct config_loader *loader, const mongoc_uri_t *uri)
{
	static const char *const INSECURE[][2] = {
	    {MONGOC_URI_TLSINSECURE, "tlsInsecure"},
	    {MONGOC_URI_TLSALLOWINVALIDCERTIFICATES, "tlsAllowInvalidCertificates"},
	    {MONGOC_URI_TLSALLOWINVALIDHOSTNAMES, "tlsAllowInvalidHostnames"},
	};
	const char *place = uri_place(loader), *remote = remote_host(uri);
	const char *key = mongoc_uri_get_option_as_utf8(uri, MONGOC_URI_TLSCERTIFICATEKEYFILE, NULL);
	if (mongoc_uri_get_password(uri) != NULL && !mongoc_uri_get_tls(uri) && remote != NULL)
		config_warning(loader,
		               "%s: what goes to %s is not encrypted, whoever is on the way can read the messages and "
		               "try passwords "
		               "at leisure; add tls=true to the URI",
		               place, remote);
	for (size_t i = 0; i < sizeof INSECURE / sizeof INSECURE[0]; i++)
		if (mongoc_uri_get_option_as_bool(uri, INSECURE[i][0], false))
			config_warning(loader,
			               "%s: with %s in the URI whoever is on the way can pose as MongoDB; take it out "
			               "and name the authority in tlsCAFile",
			               place, INSECURE[i][1]);
	if (key != NULL)
		config_warn_if_readable(loader, place, "", key);
}

static void check_with_driver(struct config_loader *loader, const char *uri, bool quotable)
{
	bson_error_t error = {0};
	mongoc_log_set_handler(quotable ? take_driver_warning : ignore_driver, loader);
	mongoc_uri_t *parsed = mongoc_uri_new_with_error(uri, &error);
	mongoc_log_set_handler(mongoc_log_default_handler, NULL);
	if (parsed == NULL && quotable)
		config_error(loader, "%s: %s", uri_place(loader), error.message);
	else if (parsed == NULL)
		config_error(loader,
		             "%s: is not a valid connection string; it may hold a secret and is not shown, the "
		             "form is mongodb://USER:PASSWORD@HOST:PORT/?OPTION=VALUE",
		             uri_place(loader));
	else {
		check_uri_concern(loader, parsed);
		check_uri_privacy(loader, parsed);
	}
	mongoc_uri_destroy(parsed);
}

void config_check_uri(struct config_loader *loader)
{
	const char *uri = loader->config->mongodb.uri;
	if (uri == NULL)
		return;
	bool srv = strncmp(uri, "mongodb+srv://", 14) == 0;
	if (!srv && strncmp(uri, "mongodb://", 10) != 0) {
		config_error(loader,
		             "%s: must start with mongodb:// or mongodb+srv://, as in "
		             "mongodb://localhost:27017",
		             uri_place(loader));
		return;
	}
	const char *rest = uri + (srv ? 14 : 10), *end = config_credentials_end(rest);
	if (end != NULL && !check_credentials(loader, rest, end))
		return;
	char *harmless = harmless_copy(uri, rest, end), *shown = config_redact_uri(harmless);
	bool secrets = strstr(shown, "=***") != NULL || (end == NULL && !is_host_list(rest));
	check_with_driver(loader, harmless, !secrets);
	memory_wipe_free(harmless);
	memory_wipe_free(shown);
}
