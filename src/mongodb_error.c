/* See mongodb_error.h. */
#include "mongodb_error.h"

#include <mongoc/mongoc.h>
#include <string.h>

static bool one_of(int code, const int *codes)
{
	for (; *codes != 0; codes++)
		if (*codes == code)
			return true;
	return false;
}

bool mongodb_is_transient(int code)
{
	static const int codes[] = {
	    1,     6,     7,     8,     24,    39,    46,    50,    63,    64,    70,    71,    74,       82,
	    83,    89,    90,    91,    100,   107,   112,   117,   133,   134,   145,   146,   149,      150,
	    172,   189,   199,   202,   203,   208,   211,   215,   216,   225,   226,   227,   237,      239,
	    246,   249,   250,   251,   256,   261,   262,   264,   267,   272,   279,   281,   282,      290,
	    314,   317,   319,   338,   342,   343,   355,   358,   363,   365,   371,   384,   388,      402,
	    406,   407,   412,   414,   433,   449,   450,   453,   462,   9001,  10058, 10107, 11600,    11601,
	    11602, 12586, 12587, 13388, 13435, 13436, 14031, 16500, 46841, 50915, 56846, 91331, 10045600, 0};
	return one_of(code, codes);
}

/* Unauthorized, AuthenticationFailed, InvalidNamespace, UnknownReplWriteConcern, a view, a hosted service's login; for
 * a command as a whole also BadValue and FailedToParse, which are mostly about its write concern. */
bool mongodb_is_configuration(uint32_t domain, int code)
{
	static const int codes[] = {2, 9, 11, 13, 18, 20, 26, 31, 48, 72, 73, 79, 166, 167, 242, 391, 8000, 13297, 0};
	return (domain == MONGOC_ERROR_CLIENT && code == MONGOC_ERROR_CLIENT_AUTHENTICATE) ||
	       ((domain == MONGOC_ERROR_SERVER || domain == MONGOC_ERROR_WRITE_CONCERN) && one_of(code, codes));
}

/* Those of five digits are assertions of the code that looked at the document: its size, its place on a map, its
 * language. There are many more of them, not all about documents. */
bool mongodb_is_about_document(int code)
{
	static const int codes[] = {2,     9,     14,    15,    16,    17,    22,    28,    52,    53,    54,    55,
	                            56,    57,    61,    66,    111,   116,   121,   153,   171,   201,   241,   357,
	                            378,   10003, 10088, 10334, 13022, 13023, 13026, 13027, 13068, 16244, 16245, 16246,
	                            16746, 16755, 16756, 16766, 16804, 17261, 17262, 17280, 17419, 17420, 0};
	return one_of(code, codes);
}

bool mongodb_is_duplicate_key(int code)
{
	static const int codes[] = {11000, 11001, 12582, 0};
	return one_of(code, codes);
}

bool mongodb_is_unmet(int code)
{
	static const int codes[] = {2, 9, 64, 79, 100, 0};
	return one_of(code, codes);
}

/* The server as it is now, whatever collection is written to: gone, no primary, out of time, out of disk, no login, no
 * such write concern. */
static bool is_about_server(int code)
{
	static const int codes[] = {6,     7,     18,    24,    50,    64,    79,    89,    91,    100,   133,
	                            134,   189,   202,   211,   261,   262,   391,   450,   462,   8000,  9001,
	                            10058, 10107, 11600, 11601, 11602, 13435, 13436, 14031, 46841, 56846, 0};
	return one_of(code, codes);
}

/* BSONObjectTooLarge and its kin: one document is too large, or has not the form of one; or their errors together are
 * (13548: the buffer for the answer would exceed 64 MB). */
static bool is_about_size(int code)
{
	static const int codes[] = {10334, 13548, 17280, 17419, 17420, 0};
	return one_of(code, codes);
}

static enum mongodb_scope scope_of_code(int code)
{
	if (is_about_server(code))
		return MONGODB_DATABASE;
	if (is_about_size(code))
		return MONGODB_DOCUMENT;
	/* What a server says that does not know itself, and BadValue and FailedToParse, which may be about anything. */
	if (code == 1 || code == 8 || code == 2 || code == 9)
		return MONGODB_UNKNOWN;
	return mongodb_is_configuration(MONGOC_ERROR_SERVER, code) || mongodb_is_transient(code) ? MONGODB_NAMESPACE
	                                                                                         : MONGODB_UNKNOWN;
}

enum mongodb_scope mongodb_error_scope(const bson_error_t *error)
{
	switch (error->domain) {
	case MONGOC_ERROR_STREAM:
		return error->code == MONGOC_ERROR_STREAM_SOCKET ? MONGODB_CONNECTION : MONGODB_DATABASE;
	case MONGOC_ERROR_CLIENT:
	case MONGOC_ERROR_SERVER_SELECTION:
	case MONGOC_ERROR_WRITE_CONCERN:
		return MONGODB_DATABASE;
	case MONGOC_ERROR_BSON:
		return MONGODB_DOCUMENT;
	case MONGOC_ERROR_COMMAND:
		return error->code == MONGOC_ERROR_COMMAND_INVALID_ARG ? MONGODB_DOCUMENT : MONGODB_UNKNOWN;
	case MONGOC_ERROR_SERVER:
		return scope_of_code((int)error->code);
	default:
		return MONGODB_UNKNOWN;
	}
}

const char *mongodb_remedy(uint32_t domain, int code)
{
	if ((domain == MONGOC_ERROR_CLIENT && code == MONGOC_ERROR_CLIENT_AUTHENTICATE) ||
	    (domain == MONGOC_ERROR_SERVER && (code == 18 || code == 8000)))
		return "; check user name, password and authSource in mongodb.uri";
	if (domain == MONGOC_ERROR_SERVER && code == 13)
		return "; the user of mongodb.uri needs the role readWrite on mongodb.database";
	if ((domain == MONGOC_ERROR_WRITE_CONCERN && mongodb_is_unmet(code)) ||
	    (domain == MONGOC_ERROR_SERVER && (code == 2 || code == 9 || code == 79 || code == 100)))
		return "; check mongodb.write_concern.w against the replica set and its members";
	if (domain == MONGOC_ERROR_SERVER_SELECTION)
		return "; is mongod running, and is mongodb.uri right?";
	return "";
}

const char *mongodb_error_title(uint32_t domain, const char *otherwise)
{
	if (domain == MONGOC_ERROR_SERVER_SELECTION || domain == MONGOC_ERROR_STREAM)
		return "MongoDB does not answer";
	if (domain == MONGOC_ERROR_CLIENT)
		return "MongoDB does not let us in";
	return otherwise;
}

int mongodb_message_length(const char *message)
{
	const char *command = strstr(message, " to execute command {");
	return command != NULL ? (int)(command - message) : (int)strlen(message);
}
