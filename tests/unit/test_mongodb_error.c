/* mongodb_error.c: what each error is about, and what is said of it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "mongodb_error.h"
#include "store_report.h"

#include <mongoc/mongoc.h>
#include <stdlib.h>
#include <string.h>

static bson_error_t error_of(uint32_t domain, int code, const char *message)
{
	bson_error_t error = {.domain = domain, .code = (uint32_t)code};
	snprintf(error.message, sizeof error.message, "%s", message);
	return error;
}

static void scopes(void **state)
{
	static const struct {
		uint32_t domain;
		int code;
		enum mongodb_scope scope;
	} cases[] = {
	    {MONGOC_ERROR_STREAM, MONGOC_ERROR_STREAM_SOCKET, MONGODB_CONNECTION},
	    {MONGOC_ERROR_STREAM, MONGOC_ERROR_STREAM_CONNECT, MONGODB_DATABASE},
	    {MONGOC_ERROR_SERVER_SELECTION, MONGOC_ERROR_SERVER_SELECTION_FAILURE, MONGODB_DATABASE},
	    {MONGOC_ERROR_CLIENT, MONGOC_ERROR_CLIENT_AUTHENTICATE, MONGODB_DATABASE},
	    {MONGOC_ERROR_WRITE_CONCERN, 64, MONGODB_DATABASE},
	    {MONGOC_ERROR_BSON, MONGOC_ERROR_BSON_INVALID, MONGODB_DOCUMENT},
	    {MONGOC_ERROR_COMMAND, MONGOC_ERROR_COMMAND_INVALID_ARG, MONGODB_DOCUMENT},
	    {MONGOC_ERROR_PROTOCOL, MONGOC_ERROR_PROTOCOL_INVALID_REPLY, MONGODB_UNKNOWN},
	    {MONGOC_ERROR_SERVER, 10107, MONGODB_DATABASE},     /* NotWritablePrimary */
	    {MONGOC_ERROR_SERVER, 91, MONGODB_DATABASE},        /* ShutdownInProgress */
	    {MONGOC_ERROR_SERVER, 11600, MONGODB_DATABASE},     /* InterruptedAtShutdown */
	    {MONGOC_ERROR_SERVER, 18, MONGODB_DATABASE},        /* AuthenticationFailed */
	    {MONGOC_ERROR_SERVER, 79, MONGODB_DATABASE},        /* UnknownReplWriteConcern */
	    {MONGOC_ERROR_SERVER, 13, MONGODB_NAMESPACE},       /* Unauthorized */
	    {MONGOC_ERROR_SERVER, 73, MONGODB_NAMESPACE},       /* InvalidNamespace */
	    {MONGOC_ERROR_SERVER, 166, MONGODB_NAMESPACE},      /* CommandNotSupportedOnView */
	    {MONGOC_ERROR_SERVER, 215, MONGODB_NAMESPACE},      /* DatabaseDropPending */
	    {MONGOC_ERROR_SERVER, 10334, MONGODB_DOCUMENT},     /* BSONObjectTooLarge */
	    {MONGOC_ERROR_SERVER, 13548, MONGODB_DOCUMENT},     /* an answer above 64 MB */
	    {MONGOC_ERROR_SERVER, 462, MONGODB_DATABASE},       /* IngressRequestRateLimitExceeded */
	    {MONGOC_ERROR_SERVER, 46841, MONGODB_DATABASE},     /* ClientMarkedKilled */
	    {MONGOC_ERROR_SERVER, 8, MONGODB_UNKNOWN},          /* UnknownError */
	    {MONGOC_ERROR_SERVER, 2, MONGODB_UNKNOWN},          /* BadValue */
	    {MONGOC_ERROR_SERVER, 10045600, MONGODB_NAMESPACE}, /* InterruptedDueToFCVChange */
	    {MONGOC_ERROR_SERVER, 99999, MONGODB_UNKNOWN},
	    {MONGOC_ERROR_SERVER, 4242, MONGODB_UNKNOWN},
	    {0, 0, MONGODB_UNKNOWN},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		bson_error_t error = error_of(cases[i].domain, cases[i].code, "");
		if (mongodb_error_scope(&error) != cases[i].scope)
			fail_msg("%u %d: %d", (unsigned)cases[i].domain, cases[i].code,
			         (int)mongodb_error_scope(&error));
	}
}

/* A code is for ever, or for now, or for somebody to mend: of each only one. */
static void kinds_exclude_each_other(void **state)
{
	for (int code = 0; code < 30000; code++) {
		assert_false(mongodb_is_transient(code) && mongodb_is_configuration(MONGOC_ERROR_SERVER, code));
		assert_false(mongodb_is_transient(code) && mongodb_is_about_document(code));
	}
}

static void what_a_report_says(void **state)
{
	struct store_report report = {0};
	bson_error_t lost = error_of(MONGOC_ERROR_SERVER_SELECTION, 13053, "no suitable servers found");
	bson_error_t right =
	    error_of(MONGOC_ERROR_SERVER, 13, "not authorized on plant to execute command { insert: \"x\" }");
	store_report_error(&report, &lost, "cannot store in MongoDB", NULL);
	assert_int_equal(report.class, STORE_TRANSIENT);
	assert_string_equal(report.message,
	                    "MongoDB does not answer: no suitable servers found (13053); is mongod running, "
	                    "and is mongodb.uri right?");
	store_report_error(&report, &right, "cannot store in MongoDB", "letters");
	assert_int_equal(report.class, STORE_CONFIGURATION);
	assert_string_equal(
	    report.message,
	    "cannot store in MongoDB: not authorized on plant (13) in the collection letters; the user of "
	    "mongodb.uri needs the role readWrite on mongodb.database");
	store_report_error(&report, &lost, "cannot store in MongoDB", NULL); /* less grave */
	assert_int_equal(report.class, STORE_CONFIGURATION);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(scopes),
	    cmocka_unit_test(kinds_exclude_each_other),
	    cmocka_unit_test(what_a_report_says),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
