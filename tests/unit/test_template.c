/* template.c: the message's fields and their ranges, what a seed repeats, how large it can become, {device} in topics.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "template.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_BYTES = 512 };

static const int64_t now = INT64_C(1795378704123); /* 2026-11-22T20:18:24.123Z */

static cJSON *parse(struct template_message message)
{
	assert_int_equal(message.length, strlen(message.payload));
	cJSON *tree = cJSON_ParseWithLengthOpts(message.payload, message.length + 1, NULL, true);
	if (tree == NULL)
		fail_msg("not JSON: %s", message.payload);
	return tree;
}

static const char *text(const cJSON *tree, const char *name)
{
	const char *value = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(tree, name));
	assert_non_null(value);
	return value;
}

static double number(const cJSON *tree, const char *name)
{
	const cJSON *item = cJSON_GetObjectItemCaseSensitive(tree, name);
	assert_true(cJSON_IsNumber(item));
	return item->valuedouble;
}

static void assert_reading(const cJSON *tree, const char *name, double low, double high, double scale)
{
	double value = number(tree, name);
	assert_true(value >= low);
	assert_true(value <= high);
	assert_true(fabs(value * scale - round(value * scale)) < 1e-6);
}

static void the_fields_in_their_order(void **state)
{
	static const char *const names[] = {"device",      "run",      "sequence", "time",
	                                    "temperature", "humidity", "battery",  "online"};
	struct template *template = template_create(10, 1);
	cJSON *tree = parse(template_render(template, 12345, now));
	int count = 0;
	const cJSON *item;
	cJSON_ArrayForEach (item, tree) {
		assert_string_equal(item->string, names[count]);
		count++;
	}
	assert_int_equal(count, sizeof names / sizeof *names);
	assert_true(number(tree, "sequence") == 12345);
	assert_string_equal(text(tree, "time"), "2026-11-22T20:18:24.123Z");
	assert_int_equal(strlen(text(tree, "run")), 8);
	assert_int_equal(strspn(text(tree, "run"), "0123456789abcdef"), 8);
	assert_true(cJSON_IsBool(cJSON_GetObjectItemCaseSensitive(tree, "online")));
	cJSON_Delete(tree);
	template_destroy(template);
}

static void readings_stay_in_their_ranges(void **state)
{
	struct template *template = template_create(3, 42);
	int devices[3] = {0}, offline = 0;
	for (uint64_t i = 0; i < 10000; i++) {
		struct template_message message = template_render(template, i, now);
		cJSON *tree = parse(message);
		assert_reading(tree, "temperature", 18, 26, 100);
		assert_reading(tree, "humidity", 30, 70, 1);
		assert_reading(tree, "battery", 3.2, 4.2, 100);
		assert_true(number(tree, "sequence") == (double)i);
		assert_string_equal(text(tree, "device"), message.device);
		int device = -1;
		assert_int_equal(sscanf(message.device, "device-%3d", &device), 1);
		assert_in_range(device, 0, 2);
		devices[device]++;
		offline += cJSON_IsFalse(cJSON_GetObjectItemCaseSensitive(tree, "online"));
		cJSON_Delete(tree);
	}
	for (int i = 0; i < 3; i++)
		assert_in_range(devices[i], 3000, 3700);
	assert_in_range(offline, 50, 200);
	template_destroy(template);
}

/* All names of one template have the same length, so that they sort. */
static void device_names(void **state)
{
	static const struct {
		int64_t devices;
		size_t digits;
	} cases[] = {{1, 3}, {10, 3}, {1000, 3}, {1001, 4}, {10000, 4}, {10001, 5}, {1000000, 6}};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct template *template = template_create(cases[i].devices, i);
		for (int k = 0; k < 1000; k++) {
			const char *device = template_render(template, 0, now).device;
			assert_int_equal(strlen(device), strlen("device-") + cases[i].digits);
			assert_memory_equal(device, "device-", 7);
			assert_int_equal(strspn(device + 7, "0123456789"), cases[i].digits);
			assert_true(strtoll(device + 7, NULL, 10) < cases[i].devices);
		}
		template_destroy(template);
	}
}

static void the_same_seed_the_same_messages(void **state)
{
	struct template *one = template_create(100, 7), *other = template_create(100, 7);
	for (uint64_t i = 0; i < 1000; i++)
		assert_string_equal(template_render(one, i, now).payload, template_render(other, i, now).payload);
	template_destroy(one);
	template_destroy(other);
}

/* From one version to the next too: what somebody compares with an earlier run. */
static void a_seed_is_for_ever(void **state)
{
	struct template *template = template_create(10, 1);
	template_render(template, 0, now);
	assert_string_equal(template_render(template, 1, now).payload,
	                    "{\"device\":\"device-005\",\"run\":\"910a2dec\",\"sequence\":1,\"time\":\"2026-11-22T20:"
	                    "18:24.123Z\",\"temperature\":22.18,\"humidity\":41,\"battery\":3.99,\"online\":true}");
	template_destroy(template);
}

static void another_seed_other_messages(void **state)
{
	struct template *one = template_create(100, 7), *other = template_create(100, 8);
	int equal = 0;
	cJSON *first = parse(template_render(one, 0, now)), *second = parse(template_render(other, 0, now));
	assert_string_not_equal(text(first, "run"), text(second, "run"));
	cJSON_Delete(first);
	cJSON_Delete(second);
	for (uint64_t i = 0; i < 1000; i++) {
		char device[32];
		snprintf(device, sizeof device, "%s", template_render(one, i, now).device);
		equal += strcmp(device, template_render(other, i, now).device) == 0;
	}
	assert_true(equal < 100);
	template_destroy(one);
	template_destroy(other);
}

/* The run's name is the same in all of its messages, whatever their time and number. */
static void readings_depend_on_neither_time_nor_number(void **state)
{
	struct template *one = template_create(100, 7), *other = template_create(100, 7);
	for (uint64_t i = 0; i < 100; i++) {
		cJSON *first = parse(template_render(one, i, now));
		cJSON *second = parse(template_render(other, 1000 + i, now + 86400000));
		static const char *const names[] = {"device", "run", "temperature", "humidity", "battery", "online"};
		for (size_t k = 0; k < sizeof names / sizeof *names; k++)
			assert_true(cJSON_Compare(cJSON_GetObjectItemCaseSensitive(first, names[k]),
			                          cJSON_GetObjectItemCaseSensitive(second, names[k]), true));
		cJSON_Delete(first);
		cJSON_Delete(second);
	}
	template_destroy(one);
	template_destroy(other);
}

static void times(void **state)
{
	static const struct {
		int64_t now;
		const char *text;
	} cases[] = {
	    {0, "1970-01-01T00:00:00.000Z"},
	    {999, "1970-01-01T00:00:00.999Z"},
	    {INT64_C(951782400005), "2000-02-29T00:00:00.005Z"},
	    {INT64_C(253402300799999), "9999-12-31T23:59:59.999Z"},
	    {INT64_C(1), "1970-01-01T00:00:00.001Z"},
	};
	struct template *template = template_create(10, 1);
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		cJSON *tree = parse(template_render(template, i, cases[i].now));
		assert_string_equal(text(tree, "time"), cases[i].text);
		cJSON_Delete(tree);
	}
	template_destroy(template);
}

/* The longest values there can be fit, and take a fifth of a kilobyte. */
static void the_size_is_bounded(void **state)
{
	static const uint64_t sequences[] = {0, UINT64_C(9007199254740992), UINT64_MAX, 1};
	for (uint64_t seed = 0; seed < 200; seed++) {
		struct template *template = template_create(1000000, seed * UINT64_C(0x123456789abcdef));
		for (size_t i = 0; i < sizeof sequences / sizeof *sequences; i++) {
			struct template_message message =
			    template_render(template, sequences[i], INT64_C(253402300799999));
			assert_true(message.length < MOST_BYTES);
			assert_in_range(message.length, 100, 220);
			cJSON_Delete(parse(message));
		}
		template_destroy(template);
	}
}

static void sequences_are_exact(void **state)
{
	static const uint64_t sequences[] = {0, 1, 999999999, UINT64_C(4294967296), UINT64_C(1000000000000001)};
	struct template *template = template_create(1, 1);
	for (size_t i = 0; i < sizeof sequences / sizeof *sequences; i++) {
		char wanted[64];
		snprintf(wanted, sizeof wanted, "\"sequence\":%llu,", (unsigned long long)sequences[i]);
		const char *payload = template_render(template, sequences[i], now).payload;
		if (strstr(payload, wanted) == NULL)
			fail_msg("no %s in %s", wanted, payload);
	}
	template_destroy(template);
}

static void destroy_takes_nothing(void **state)
{
	template_destroy(NULL);
}

/* ---- topics ---- */

static void assert_topic(const char *topic, const char *device, const char *expected)
{
	char *out = malloc(strlen(expected) + 1); /* of exactly its size */
	assert_non_null(out);
	assert_true(template_topic(topic, device, out, strlen(expected) + 1));
	assert_string_equal(out, expected);
	/* every size below it is too small */
	for (size_t size = 1; size <= strlen(expected); size++) {
		char *small = malloc(size);
		assert_non_null(small);
		assert_false(template_topic(topic, device, small, size));
		free(small);
	}
	free(out);
}

static void device_in_topics(void **state)
{
	assert_topic("sensors/{device}/readings", "device-007", "sensors/device-007/readings");
	assert_topic("{device}", "d", "d");
	assert_topic("{device}{device}/{device}", "ab", "abab/ab");
	assert_topic("no/place", "d", "no/place");
	assert_topic("{device", "d", "{device");
	assert_topic("{{device}}", "d", "{d}");
	assert_topic("{Device}/{devices}/{ device}/}", "d", "{Device}/{devices}/{ device}/}");
	assert_topic("a/{device}", "{device}", "a/{device}");
	assert_topic("caf\xc3\xa9/{device}", "\xf0\x9d\x84\x9e", "caf\xc3\xa9/\xf0\x9d\x84\x9e");
	assert_topic("{device}", "", "");
	assert_topic("", "d", "");
}

static void topics_and_filters(void **state)
{
	static const struct {
		const char *topic, *filter;
		bool may;
	} cases[] = {
	    {"a/b", "a/b", true},
	    {"a/b", "a/c", false},
	    {"a/b", "a", false},
	    {"a", "a/b", false},
	    {"a/b", "#", true},
	    {"a/b", "a/#", true},
	    {"a", "a/#", true},
	    {"a/b", "b/#", false},
	    {"a/b", "a/b/#", true},
	    {"a/b", "a/b/c/#", false},
	    {"a/b", "+/+", true},
	    {"a/b", "+", false},
	    {"a/b", "+/b", true},
	    {"a/b", "a/+/c", false},
	    {"a/b", "a/+/#", true},
	    {"a//b", "a//b", true},
	    {"a/x/b", "a//b", false},
	    {"a//b", "a/+/b", true},
	    {"", "", true},
	    {"ab", "a", false},
	    {"a", "ab", false},
	    {"sensors/{device}/readings", "sensors/#", true},
	    {"sensors/{device}/readings", "sensors/+/readings", true},
	    {"sensors/{device}/readings", "sensors/device-007/readings", true},
	    {"sensors/{device}/readings", "sensors/+", false},
	    {"sensors/{device}/readings", "plant/#", false},
	    {"sensors/x-{device}", "sensors/x-device-1", true},
	    {"sensors/x/{device}", "sensors/y/device-1", false},
	    {"{device}", "device-1", true},
	    {"{device}/a", "device-1/b", false},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
		if (template_topic_may_match(cases[i].topic, cases[i].filter) != cases[i].may)
			fail_msg("%s and %s", cases[i].topic, cases[i].filter);
}

static void the_run_has_a_name(void **state)
{
	struct template *template = template_create(3, 4);
	cJSON *tree = parse(template_render(template, 0, now));
	assert_string_equal(text(tree, "run"), template_run(template));
	cJSON_Delete(tree);
	template_destroy(template);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(topics_and_filters),
	    cmocka_unit_test(the_run_has_a_name),
	    cmocka_unit_test(the_fields_in_their_order),
	    cmocka_unit_test(readings_stay_in_their_ranges),
	    cmocka_unit_test(device_names),
	    cmocka_unit_test(the_same_seed_the_same_messages),
	    cmocka_unit_test(a_seed_is_for_ever),
	    cmocka_unit_test(another_seed_other_messages),
	    cmocka_unit_test(readings_depend_on_neither_time_nor_number),
	    cmocka_unit_test(times),
	    cmocka_unit_test(the_size_is_bounded),
	    cmocka_unit_test(sequences_are_exact),
	    cmocka_unit_test(destroy_takes_nothing),
	    cmocka_unit_test(device_in_topics),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
