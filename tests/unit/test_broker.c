/* broker.c: which versions lose messages of shared subscriptions. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "broker.h"

#include <string.h>

static bool loses(const char *version)
{
	return broker_loses_shares(version, strlen(version));
}

static void versions(void **state)
{
	assert_true(loses("mosquitto version 2.0.11"));
	assert_true(loses("mosquitto version 2.0.0"));
	assert_true(loses("mosquitto version 1.6.9"));
	assert_false(loses("mosquitto version 2.0.12"));
	assert_false(loses("mosquitto version 2.0.21"));
	assert_false(loses("mosquitto version 2.1.0"));
	assert_false(loses("mosquitto version 3.0.1"));
}

static void what_is_no_version(void **state)
{
	char long_text[200];
	memset(long_text, '1', sizeof long_text);
	assert_false(loses(""));
	assert_false(loses("EMQX 5.8"));
	assert_false(loses("mosquitto version"));
	assert_false(loses("mosquitto version 2.0"));
	assert_false(loses("mosquitto version 2.0."));
	assert_false(loses("mosquitto version 99999999999.0.1"));
	assert_false(broker_loses_shares(long_text, sizeof long_text));
	assert_false(broker_loses_shares("mosquitto version 2.0.11", 20));
	assert_true(broker_loses_shares("mosquitto version 2.0.11", 23)); /* ends behind 2.0.1 */
}

static bool reads(const char *text, uint64_t expected)
{
	uint64_t number = UINT64_MAX;
	return broker_number(text, strlen(text), &number) && number == expected;
}

static void numbers(void **state)
{
	uint64_t number;
	assert_true(reads("0", 0));
	assert_true(reads("007", 7));
	assert_true(reads("9999999999999999999", UINT64_C(9999999999999999999)));
	assert_false(reads("", 0));
	assert_false(reads("10000000000000000000", 0));
	assert_false(reads("-1", 0));
	assert_false(reads("1.5", 0));
	assert_false(reads("12 ", 0));
	assert_true(broker_number("123", 2, &number) && number == 12);
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(versions), cmocka_unit_test(what_is_no_version),
	                                   cmocka_unit_test(numbers)};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
