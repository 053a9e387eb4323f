/*
 * id.c: which parts make a rule, what is said about those that do not, and the _id that a rule makes of a message, type
 * by type, against what libbson writes.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "id.h"
#include "json.h"

#include <stdio.h>
#include <stdlib.h>

/* Parts as in the tests: separated by a space, which none of them holds. */
static char *parse(struct id_rule *rule, const char *parts)
{
	char *text = strdup(parts), *rest = text, *part;
	const char *list[16];
	size_t count = 0;
	assert_non_null(text);
	while ((part = strsep(&rest, " ")) != NULL)
		list[count++] = part;
	char *fault = id_rule_parse(rule, list, count);
	free(text);
	return fault;
}

static struct id_rule rule_of(const char *parts)
{
	struct id_rule rule;
	char *fault = parse(&rule, parts);
	if (fault != NULL)
		fail_msg("%s: %s", parts, fault);
	return rule;
}

/* ---- a message ---- */

struct message {
	struct buffer document, properties;
	struct id_source source;
};

static void message_init(struct message *message, const char *topic, const char *json)
{
	struct json_fault fault;
	*message = (struct message){0};
	struct buffer *document = &message->document;
	buffer_extend(document, 4);
	if (json_to_bson(json, strlen(json), "payload", 1 << 20, document, &fault) != JSON_OK)
		fail_msg("%s: %s", json, fault.message);
	buffer_append_byte(document, 0);
	for (int i = 0; i < 4; i++)
		document->data[i] = (uint8_t)(document->length >> (8 * i));
	message->source = (struct id_source){.topic = topic,
	                                     .topic_length = strlen(topic),
	                                     .document = document->data,
	                                     .document_length = document->length};
}

static void message_property(struct message *message, const char *name, const char *value)
{
	id_keep_property(&message->properties, name, value);
	message->source.properties = (const char *)message->properties.data;
	message->source.properties_length = message->properties.length;
}

static void message_finish(struct message *message)
{
	buffer_finish(&message->document);
	buffer_finish(&message->properties);
}

/* The rule makes `expected` of the message, or nothing when that is NULL. `expected` is freed. */
static void assert_id(const char *parts, struct message *message, bson_t *expected)
{
	struct id_rule rule = rule_of(parts);
	bson_t id;
	bson_init(&id);
	bool built = id_build(&rule, &message->source, &id);
	char *text = bson_as_canonical_extended_json(&id, NULL);
	if (built != (expected != NULL))
		fail_msg("%s makes %s", parts, text);
	if (expected != NULL && !bson_equal(&id, expected))
		fail_msg("%s makes %s, not %s", parts, text, bson_as_canonical_extended_json(expected, NULL));
	if (expected == NULL)
		assert_int_equal(bson_count_keys(&id), 0);
	bson_free(text);
	bson_destroy(&id);
	bson_destroy(expected);
	id_rule_finish(&rule);
}

/* The same for a message of that payload. */
static void assert_payload(const char *parts, const char *json, bson_t *expected)
{
	struct message message;
	message_init(&message, "a/b", json);
	assert_id(parts, &message, expected);
	message_finish(&message);
}

/* ---- rules ---- */

static void objectid_is_no_rule(void **state)
{
	struct id_rule rule = rule_of("objectid");
	assert_null(rule.parts);
	assert_int_equal(rule.count, 0);
	assert_int_equal(rule.property_count, 0);
	struct message message;
	message_init(&message, "a/b", "1");
	bson_t id;
	bson_init(&id);
	assert_false(id_build(&rule, &message.source, &id));
	bson_destroy(&id);
	message_finish(&message);
	id_rule_finish(&rule);
	id_rule_finish(&rule);
}

static void rules_are_taken(void **state)
{
	struct id_rule rule = rule_of("topic /a/b~1c/~01 user-property:message-id user-property:topic/");
	assert_int_equal(rule.count, 4);
	assert_int_equal(rule.property_count, 2);
	assert_int_equal(rule.parts[0].kind, ID_TOPIC);
	assert_string_equal(rule.parts[0].name, "topic");
	assert_int_equal(rule.parts[1].kind, ID_POINTER);
	assert_string_equal(rule.parts[1].name, "a/b~1c/~01");
	assert_int_equal(rule.parts[1].token_count, 3);
	assert_memory_equal(rule.parts[1].tokens, "a\0b/c\0~1", sizeof "a\0b/c\0~1");
	assert_int_equal(rule.parts[2].kind, ID_PROPERTY);
	assert_string_equal(rule.parts[2].name, "message-id");
	assert_string_equal(rule.parts[3].name, "topic/");
	id_rule_finish(&rule);
	rule = rule_of("/1 /2 /3 /4 /5 /6 /7 /8");
	assert_int_equal(rule.count, ID_PARTS_MOST);
	id_rule_finish(&rule);
	static const char *const alone[] = {"/", "/$id", "user-property:$id", "//", "/ä"};
	for (size_t i = 0; i < sizeof alone / sizeof *alone; i++) {
		rule = rule_of(alone[i]);
		id_rule_finish(&rule);
	}
}

/* Each complaint quotes the part and says what to write. */
static void rules_are_refused(void **state)
{
	static const struct {
		const char *parts, *words[3];
	} cases[] = {
	    {"id", {"\"id\" is no part", "\"/id\"", "\"user-property:id\""}},
	    {"Topic", {"\"Topic\"", "\"topic\""}},
	    {"", {"\"\" is no part", "\"/id\""}},
	    {"topic ", {"\"\" is no part", "\"/id\""}},
	    {"user-property:", {"\"user-property:\"", "name", "user-property:message-id"}},
	    {"objectid topic", {"objectid", "alone"}},
	    {"topic objectid", {"objectid", "alone"}},
	    {"topic topic", {"\"topic\"", "leave one"}},
	    {"topic /topic", {"\"/topic\"", "named \"topic\"", "leave one"}},
	    {"/a user-property:a", {"\"user-property:a\"", "named \"a\""}},
	    {"topic /", {"\"/\"", "no name", "alone"}},
	    {"topic /$id", {"\"/$id\"", "$", "alone"}},
	    {"user-property:$id topic", {"\"user-property:$id\"", "$", "alone"}},
	    {"/a~", {"\"/a~\"", "~0", "~1"}},
	    {"/a~2", {"\"/a~2\"", "~0", "~1"}},
	    {"/a topic /~x/b", {"\"/~x/b\"", "~0"}},
	    {"/\xff", {"UTF-8"}},
	    {"user-property:\xc0\x80", {"UTF-8"}},
	    {"/1 /2 /3 /4 /5 /6 /7 /8 /9", {"9 parts", "8"}},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct id_rule rule;
		char *fault = parse(&rule, cases[i].parts);
		if (fault == NULL) {
			fail_msg("%s is taken", cases[i].parts);
			return;
		}
		for (size_t word = 0; word < 3 && cases[i].words[word] != NULL; word++)
			if (strstr(fault, cases[i].words[word]) == NULL)
				fail_msg("%s: no %s in: %s", cases[i].parts, cases[i].words[word], fault);
		assert_null(rule.parts);
		assert_int_equal(rule.count, 0);
		free(fault);
	}
	struct id_rule rule;
	char *fault = id_rule_parse(&rule, NULL, 0);
	assert_non_null(strstr(fault, "empty"));
	free(fault);
}

/* ---- what they make ---- */

static void values_keep_their_type(void **state)
{
	bson_decimal128_t decimal;
	bson_decimal128_from_string("12345678901234567890", &decimal);
	assert_payload("/id", "{\"id\":5}", BCON_NEW("_id", BCON_INT32(5)));
	assert_payload("/id", "{\"id\":5000000000}", BCON_NEW("_id", BCON_INT64(5000000000)));
	assert_payload("/id", "{\"id\":5.0}", BCON_NEW("_id", BCON_DOUBLE(5)));
	assert_payload("/id", "{\"id\":12345678901234567890}", BCON_NEW("_id", BCON_DECIMAL128(&decimal)));
	assert_payload("/id", "{\"id\":true}", BCON_NEW("_id", BCON_BOOL(true)));
	assert_payload("/id", "{\"id\":false}", BCON_NEW("_id", BCON_BOOL(false)));
	assert_payload("/id", "{\"id\":\"x\"}", BCON_NEW("_id", BCON_UTF8("x")));
	assert_payload("/id", "{\"id\":\"\"}", BCON_NEW("_id", BCON_UTF8("")));
	bson_t *nul = bson_new();
	bson_append_utf8(nul, "_id", -1, "a\0b", 3);
	assert_payload("/id", "{\"id\":\"a\\u0000b\"}", nul);
}

static void pointers_lead_anywhere(void **state)
{
	static const char json[] = "{\"a\":{\"b\":[10,[20,{\"c\":30}]]},\"\":{\"\":40},\"x/y\":50,\"x~y\":60,\"~1\":70,"
				   "\"a.b\":80,\"0\":90,\"$set\":100,\"two\":1,\"two\":2,\"\xc3\xa4\":110}";
	assert_payload("/a/b/0", json, BCON_NEW("_id", BCON_INT32(10)));
	assert_payload("/a/b/1/0", json, BCON_NEW("_id", BCON_INT32(20)));
	assert_payload("/a/b/1/1/c", json, BCON_NEW("_id", BCON_INT32(30)));
	assert_payload("//", json, BCON_NEW("_id", BCON_INT32(40)));
	assert_payload("/x~1y", json, BCON_NEW("_id", BCON_INT32(50)));
	assert_payload("/x~0y", json, BCON_NEW("_id", BCON_INT32(60)));
	assert_payload("/~01", json, BCON_NEW("_id", BCON_INT32(70)));
	assert_payload("/a.b", json, BCON_NEW("_id", BCON_INT32(80)));
	assert_payload("/0", json, BCON_NEW("_id", BCON_INT32(90)));
	assert_payload("/$set", json, BCON_NEW("_id", BCON_INT32(100)));
	assert_payload("/two", json, BCON_NEW("_id", BCON_INT32(1)));
	assert_payload("/\xc3\xa4", json, BCON_NEW("_id", BCON_INT32(110)));
	static const char *const nowhere[] = {"/b", "/a/b/2", "/a/b/-",   "/a/b/00", "/a/b/01", "/a/b/1/1/d", "/A",
	                                      "/x", "/",      "/a/b/0/0", "/two/0",  "/a.b/c",  "/a/b/1/"};
	for (size_t i = 0; i < sizeof nowhere / sizeof *nowhere; i++)
		assert_payload(nowhere[i], json, NULL);
	assert_payload("/0", "[\"first\"]", BCON_NEW("_id", BCON_UTF8("first")));
	assert_payload("/0/0", "[[7]]", BCON_NEW("_id", BCON_INT32(7)));
}

static void what_is_no_id(void **state)
{
	assert_payload("/id", "{\"id\":null}", NULL);
	assert_payload("/id", "{\"id\":{\"$oid\":\"0123456789abcdef01234567\"}}", NULL);
	assert_payload("/id", "{\"id\":[1]}", NULL);
	assert_payload("/id", "{}", NULL);
	assert_payload("/id", "[]", NULL);
	assert_payload("/id", "5", NULL);
	assert_payload("/id", "\"id\"", NULL);
	assert_payload("/", "null", NULL);
}

static void a_text_has_a_limit(void **state)
{
	char text[ID_TEXT_MOST + 2], json[ID_TEXT_MOST + 20];
	memset(text, 'x', sizeof text);
	for (size_t length = ID_TEXT_MOST; length <= ID_TEXT_MOST + 1; length++) {
		bool fits = length <= ID_TEXT_MOST;
		text[length] = 0;
		snprintf(json, sizeof json, "[\"%s\"]", text);
		assert_payload("/0", json, fits ? BCON_NEW("_id", BCON_UTF8(text)) : NULL);
		struct message message;
		message_init(&message, text, "1");
		assert_id("topic", &message, fits ? BCON_NEW("_id", BCON_UTF8(text)) : NULL);
		message_property(&message, "p", text);
		assert_int_equal(message.properties.length, fits ? 2 + length + 1 : 0);
		assert_id("user-property:p", &message, fits ? BCON_NEW("_id", BCON_UTF8(text)) : NULL);
		message_finish(&message);
		text[length] = 'x';
	}
}

static void several_parts_are_a_document(void **state)
{
	struct message message;
	message_init(&message, "plant/7", "{\"seq\":12,\"at\":{\"x~y\":1.5},\"none\":null}");
	message_property(&message, "run", "r1");
	assert_id("topic", &message, BCON_NEW("_id", BCON_UTF8("plant/7")));
	assert_id("topic /seq", &message,
	          BCON_NEW("_id", "{", "topic", BCON_UTF8("plant/7"), "seq", BCON_INT32(12), "}"));
	assert_id("/at/x~0y user-property:run topic", &message,
	          BCON_NEW("_id", "{", "at/x~0y", BCON_DOUBLE(1.5), "run", BCON_UTF8("r1"), "topic",
	                   BCON_UTF8("plant/7"), "}"));
	/* one that is missing spoils all */
	assert_id("topic /none", &message, NULL);
	assert_id("/missing topic", &message, NULL);
	assert_id("topic user-property:other", &message, NULL);
	message_finish(&message);
}

static void the_first_property_counts(void **state)
{
	struct message message;
	message_init(&message, "t", "{}");
	assert_id("user-property:p", &message, NULL);
	message_property(&message, "q", "p");
	assert_id("user-property:p", &message, NULL);
	message_property(&message, "p", "one");
	message_property(&message, "p", "two");
	message_property(&message, "empty", "");
	message_property(&message, "bad", "\xff");
	assert_id("user-property:p", &message, BCON_NEW("_id", BCON_UTF8("one")));
	assert_id("user-property:q", &message, BCON_NEW("_id", BCON_UTF8("p")));
	assert_id("user-property:empty", &message, BCON_NEW("_id", BCON_UTF8("")));
	assert_id("user-property:bad", &message, NULL);
	message_finish(&message);
}

/* A run that something has cut short is read as far as it goes, and no further. */
static void a_damaged_run_of_properties(void **state)
{
	struct buffer run = {0};
	id_keep_property(&run, "name", "value");
	id_keep_property(&run, "n2", "v2");
	for (size_t length = 0; length <= run.length; length++) {
		char *copy = malloc(length + 1);
		assert_non_null(copy);
		memcpy(copy, run.data, length);
		const char *at = copy, *name, *value;
		size_t found = 0;
		while (id_next_property(&at, copy + length, &name, &value))
			assert_string_equal(value, found++ == 0 ? "value" : "v2");
		assert_int_equal(found, length == run.length ? 2 : length >= sizeof "name\0value" ? 1 : 0);
		free(copy);
	}
	buffer_finish(&run);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(objectid_is_no_rule),       cmocka_unit_test(rules_are_taken),
	    cmocka_unit_test(rules_are_refused),         cmocka_unit_test(values_keep_their_type),
	    cmocka_unit_test(pointers_lead_anywhere),    cmocka_unit_test(what_is_no_id),
	    cmocka_unit_test(a_text_has_a_limit),        cmocka_unit_test(several_parts_are_a_document),
	    cmocka_unit_test(the_first_property_counts), cmocka_unit_test(a_damaged_run_of_properties),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
