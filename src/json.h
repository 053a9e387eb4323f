/*
 * Strict RFC 8259 text to one BSON element, in one pass, with exact types. Pure: no clock, no global, no lock,
 * so that it can be tested and fuzzed alone. Called by worker threads for every payload.
 *
 * Types: a number without '.', 'e' or 'E' becomes int32 when it fits, else int64, else Decimal128 while that holds
 * every digit (34 significant digits as written, leading zeros cannot occur), else JSON_NUMBER_RANGE. "-0" is int32 0.
 * Any other number becomes the nearest double; one that overflows to infinity is JSON_NUMBER_RANGE; underflow to a
 * subnormal or 0 is accepted. Strings keep \u0000. Keys are stored as they are ("", "$set", "a.b", duplicates, in
 * order), but one with a NUL is JSON_KEY_NUL, since BSON keys end at a NUL. true/false/null as BSON bool/null.
 *
 * Refused, with the byte offset of the first byte that cannot be part of valid text: everything RFC 8259 refuses
 * (leading zeros, "1.", "+1", raw control characters, bad escapes, lone surrogates, trailing bytes or commas,
 * comments, a byte order mark, NaN, …), invalid UTF-8 (overlong forms incl. C0 80, surrogates, above U+10FFFF,
 * truncated sequences), nesting deeper than JSON_MAX_DEPTH arrays and objects.
 *
 * strtod() reads the rare number that is not exact at once: LC_NUMERIC must stay "C", as it is in a process that
 * never calls setlocale().
 */
#ifndef MQTT2MONGO_JSON_H
#define MQTT2MONGO_JSON_H

#include "buffer.h"

enum { JSON_MAX_DEPTH = 100 };

enum json_code {
	JSON_OK,
	JSON_EMPTY,        /* no bytes, or only white space */
	JSON_SYNTAX,       /* not JSON text by RFC 8259 */
	JSON_UTF8,         /* bytes that are not UTF-8, in or outside a string; a byte order mark is JSON_SYNTAX */
	JSON_DEPTH,        /* more than JSON_MAX_DEPTH levels */
	JSON_NUMBER_RANGE, /* an integer no BSON type holds exactly, or a double that overflows */
	JSON_KEY_NUL,      /* a key with \u0000 */
	JSON_TOO_LARGE,    /* the BSON value would exceed `limit` bytes */
};

struct json_fault {
	enum json_code code;
	size_t offset; /* byte of the text where it went wrong; for JSON_NUMBER_RANGE and JSON_KEY_NUL the start of
	                  the number or key; for JSON_DEPTH the bracket; for JSON_TOO_LARGE where reading stopped;
	                  length of the text when it ended too early, for JSON_EMPTY and JSON_OK */
	const char *message; /* static text: "leading zero", "unescaped control character in string", …; or "ok" */
};

/*
 * Append one BSON element (type byte, `key` with its NUL, value) for the JSON value in `text` to `out`.
 *
 * text    the payload; text[length] must be readable and 0
 * key     the element's name, without NUL bytes
 * limit   the most bytes the element may take, JSON_TOO_LARGE above; memory above it is not touched by much
 *         (checked at least once per value); never more than BSON's own 2^31 - 1
 * fault   filled in every case
 *
 * Returns JSON_OK, or the code, and then `out` has its old length. Reentrant; any thread.
 */
enum json_code json_to_bson(const char *text, size_t length, const char *key, size_t limit, struct buffer *out,
                            struct json_fault *fault);

/* The code's stable name for a dead letter's reason.code and for metrics: "empty_payload", "invalid_json",
 * "invalid_utf8", "too_deep", "number_out_of_range", "key_with_nul", "document_too_large". JSON_OK: "ok". */
const char *json_code_name(enum json_code code);

#endif
