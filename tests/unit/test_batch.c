/*
 * batch.c: messages are copied whole, with their flags and an id each; of one that is too large the beginning is kept,
 * with length and digest of the whole; a batch is filled again and again.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "batch.h"
#include "mqtt.h"

#include <mosquitto.h>
#include <mqtt_protocol.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_PAYLOAD = 1000, NOW = 1700000000 };
static const struct id_rule object_ids;
#define MIB ((size_t)1024 * 1024)

static struct message message_of(const char *topic, const void *payload, size_t length)
{
	return (struct message){
	    .topic = topic,
	    .topic_length = strlen(topic),
	    .payload = payload,
	    .payload_length = length,
	    .qos = 1,
	};
}

static void add(struct batch *batch, const char *topic, const void *payload, size_t length, size_t max_payload)
{
	struct message message = message_of(topic, payload, length);
	batch_add(batch, &message, &object_ids, max_payload, NOW);
}

static const struct batch_message *last(const struct batch *batch)
{
	assert_true(batch->count > 0);
	return &batch->messages[batch->count - 1];
}

/* Payload and topic as they were given, with a NUL behind each. */
static void assert_holds(const struct batch *batch, size_t index, const char *topic, const void *payload, size_t length)
{
	const struct batch_message *message = &batch->messages[index];
	assert_int_equal(message->topic_length, strlen(topic));
	assert_string_equal(batch_topic(batch, message), topic);
	assert_int_equal(message->payload_length, length);
	if (length > 0)
		assert_memory_equal(batch_payload(batch, message), payload, length);
	assert_int_equal(batch_payload(batch, message)[length], 0);
}

static void a_message_is_copied(void **state)
{
	struct batch batch = {0};
	char topic[] = "sensors/a", payload[] = "{\"n\": 1}";
	struct message message = message_of(topic, payload, strlen(payload));
	message.retain = message.dup = true;
	batch_add(&batch, &message, &object_ids, MAX_PAYLOAD, INT64_C(1795378704123));
	memset(topic, '?', sizeof topic);
	memset(payload, '?', sizeof payload);
	assert_int_equal(batch.count, 1);
	assert_holds(&batch, 0, "sensors/a", "{\"n\": 1}", 8);
	const struct batch_message *kept = last(&batch);
	assert_int_equal(kept->full_length, 8);
	assert_int_equal(kept->received_at, INT64_C(1795378704123));
	assert_int_equal(kept->qos, 1);
	assert_true(kept->retain);
	assert_true(kept->dup);
	assert_false(kept->oversized);
	assert_int_equal(kept->outcome, BATCH_OPEN);
	assert_int_equal(kept->reason, 0);
	batch_finish(&batch);
}

static void flags_are_each_messages_own(void **state)
{
	struct batch batch = {0};
	for (int flags = 0; flags < 8; flags++) {
		struct message message = message_of("t", "1", 1);
		message.qos = flags & 1;
		message.retain = flags & 2;
		message.dup = flags & 4;
		batch_add(&batch, &message, &object_ids, MAX_PAYLOAD, flags);
	}
	for (int flags = 0; flags < 8; flags++) {
		assert_int_equal(batch.messages[flags].qos, flags & 1);
		assert_int_equal(batch.messages[flags].retain, (flags & 2) != 0);
		assert_int_equal(batch.messages[flags].dup, (flags & 4) != 0);
		assert_int_equal(batch.messages[flags].received_at, flags);
	}
	batch_finish(&batch);
}

static void empty_payload_and_bytes_of_all_kinds(void **state)
{
	struct batch batch = {0};
	static const char bytes[] = "\0\xff\0{}\n";
	add(&batch, "a", NULL, 0, MAX_PAYLOAD);
	add(&batch, "b/\xff\xfe", bytes, sizeof bytes, MAX_PAYLOAD);
	add(&batch, "c", "", 0, MAX_PAYLOAD);
	assert_holds(&batch, 0, "a", "", 0);
	assert_holds(&batch, 1, "b/\xff\xfe", bytes, sizeof bytes);
	assert_holds(&batch, 2, "c", "", 0);
	batch_finish(&batch);
}

/* The arena moves as it grows; what it holds must not mix. */
static void thousands_do_not_mix(void **state)
{
	enum { COUNT = 5000 };
	struct batch batch = {0};
	char topic[32], payload[600];
	for (size_t i = 0; i < COUNT; i++) {
		snprintf(topic, sizeof topic, "sensors/%zu", i);
		memset(payload, 'a' + (int)(i % 26), sizeof payload);
		add(&batch, topic, payload, i % sizeof payload, MAX_PAYLOAD);
	}
	assert_int_equal(batch.count, COUNT);
	for (size_t i = 0; i < COUNT; i++) {
		snprintf(topic, sizeof topic, "sensors/%zu", i);
		memset(payload, 'a' + (int)(i % 26), sizeof payload);
		assert_holds(&batch, i, topic, payload, i % sizeof payload);
	}
	batch_finish(&batch);
}

static int compare_ids(const void *one, const void *other)
{
	return memcmp(one, other, sizeof(bson_oid_t));
}

static void every_message_has_its_own_id(void **state)
{
	enum { COUNT = 2000 };
	static bson_oid_t ids[COUNT];
	struct batch batch = {0};
	for (size_t i = 0; i < COUNT; i++) {
		if (i % 500 == 0)
			batch_reset(&batch);
		add(&batch, "t", "1", 1, MAX_PAYLOAD);
		ids[i] = last(&batch)->id;
	}
	qsort(ids, COUNT, sizeof *ids, compare_ids);
	for (size_t i = 1; i < COUNT; i++)
		assert_memory_not_equal(&ids[i - 1], &ids[i], sizeof *ids);
	batch_finish(&batch);
}

/* ---- too large ---- */

static void assert_digest(const struct batch *batch, const char *hexadecimal)
{
	char text[2 * BATCH_DIGEST_BYTES + 1];
	for (size_t i = 0; i < BATCH_DIGEST_BYTES; i++)
		snprintf(text + 2 * i, 3, "%02x", batch->arena.data[last(batch)->digest + i]);
	assert_string_equal(text, hexadecimal);
}

/* `length` letters a. */
static void add_letters(struct batch *batch, size_t length, size_t max_payload)
{
	char *payload = malloc(length);
	assert_non_null(payload);
	memset(payload, 'a', length);
	add(batch, "large", payload, length, max_payload);
	assert_holds(batch, batch->count - 1, "large", payload, last(batch)->payload_length);
	free(payload);
}

static void the_limit_itself_is_not_too_large(void **state)
{
	struct batch batch = {0};
	add_letters(&batch, 3 * MIB, 3 * MIB);
	assert_false(last(&batch)->oversized);
	assert_int_equal(last(&batch)->payload_length, 3 * MIB);
	assert_int_equal(last(&batch)->full_length, 3 * MIB);
	batch_finish(&batch);
}

/* The digests are sha256sum's. */
static void of_a_large_one_the_beginning_is_kept(void **state)
{
	struct batch batch = {0};
	add(&batch, "before", "1", 1, MAX_PAYLOAD);
	add_letters(&batch, 3 * MIB + 1, 3 * MIB);
	assert_true(last(&batch)->oversized);
	assert_int_equal(last(&batch)->payload_length, BATCH_TRUNCATED_BYTES);
	assert_int_equal(last(&batch)->full_length, 3 * MIB + 1);
	assert_digest(&batch, "2b98b70051781969f52a33c9cd0e8392bb7a634a92a3be4597b25e13feb41ee6");
	add(&batch, "behind", "2", 1, MAX_PAYLOAD);
	assert_holds(&batch, 0, "before", "1", 1);
	assert_holds(&batch, 2, "behind", "2", 1);
	batch_finish(&batch);
}

static void just_above_what_is_kept(void **state)
{
	struct batch batch = {0};
	add_letters(&batch, BATCH_TRUNCATED_BYTES + 1, BATCH_TRUNCATED_BYTES);
	assert_true(last(&batch)->oversized);
	assert_int_equal(last(&batch)->payload_length, BATCH_TRUNCATED_BYTES);
	assert_int_equal(last(&batch)->full_length, BATCH_TRUNCATED_BYTES + 1);
	assert_digest(&batch, "4a3f0c0c213adea174f9a3d4c13177315b588bdb2e9c1012d3d0bf0453ca0f6a");
	batch_finish(&batch);
}

/* With a small consumer.max_payload what is refused still fits whole. */
static void above_a_small_limit_all_is_kept(void **state)
{
	struct batch batch = {0};
	add_letters(&batch, MAX_PAYLOAD + 1, MAX_PAYLOAD);
	assert_int_equal(last(&batch)->payload_length, MAX_PAYLOAD + 1);
	assert_int_equal(last(&batch)->full_length, MAX_PAYLOAD + 1);
	assert_digest(&batch, "bb0381c13e0817201355e7d700b7623f0e985287add78712a11407c9f754efc8");
	batch_finish(&batch);
}

/* ---- outcomes, and the next round ---- */

/* ---- user properties ---- */

static struct id_rule rule_of(const char *const *parts, size_t count)
{
	struct id_rule rule;
	assert_null(id_rule_parse(&rule, parts, count));
	return rule;
}

static void assert_properties(const struct batch *batch, const struct batch_message *message, const char *expected,
                              size_t length)
{
	assert_int_equal(message->properties_length, length);
	if (length > 0)
		assert_memory_equal(batch_properties(batch, message), expected, length);
}
#define assert_kept(batch, message, literal) assert_properties(batch, message, literal, sizeof(literal))

/* Of each property that the rule names the first is kept, in the rule's order; nothing of the others. */
static void named_properties_are_kept(void **state)
{
	static const char *const parts[] = {"user-property:id", "topic", "user-property:run", "user-property:none"};
	char too_long[ID_TEXT_MOST + 2] = "";
	memset(too_long, 'x', ID_TEXT_MOST + 1);
	static const char *const given[][2] = {{"other", "0"}, {"run", "r"}, {"id", "1"}, {"id", "2"}, {"", ""}};
	mosquitto_property *list = NULL;
	for (size_t i = 0; i < sizeof given / sizeof *given; i++)
		assert_int_equal(
		    mosquitto_property_add_string_pair(&list, MQTT_PROP_USER_PROPERTY, given[i][0], given[i][1]), 0);
	assert_int_equal(mosquitto_property_add_string_pair(&list, MQTT_PROP_USER_PROPERTY, "none", too_long), 0);
	struct id_rule rule = rule_of(parts, 4);
	struct batch batch = {0};
	struct message message = message_of("t", "1", 1);
	message.user_property = mqtt_user_property;
	message.properties = list;
	batch_add(&batch, &message, &rule, MAX_PAYLOAD, NOW);
	batch_add(&batch, &message, &object_ids, MAX_PAYLOAD, NOW);
	message.properties = NULL;
	batch_add(&batch, &message, &rule, MAX_PAYLOAD, NOW);
	assert_kept(&batch, &batch.messages[0],
	            "id\0"
	            "1\0run\0r");
	assert_properties(&batch, &batch.messages[1], NULL, 0);
	assert_properties(&batch, &batch.messages[2], NULL, 0);
	for (size_t i = 0; i < batch.count; i++)
		assert_holds(&batch, i, "t", "1", 1);

	struct batch restored = {0};
	const struct batch_message *kept = &batch.messages[0];
	struct batch_record record = {.topic = "t",
	                              .topic_length = 1,
	                              .payload = "1",
	                              .payload_length = 1,
	                              .full_length = 1,
	                              .properties = batch_properties(&batch, kept),
	                              .properties_length = kept->properties_length};
	batch_restore(&restored, &record);
	record.properties = NULL;
	record.properties_length = 0;
	batch_restore(&restored, &record);
	assert_kept(&restored, &restored.messages[0],
	            "id\0"
	            "1\0run\0r");
	assert_properties(&restored, &restored.messages[1], NULL, 0);
	assert_holds(&restored, 0, "t", "1", 1);
	batch_finish(&restored);
	batch_finish(&batch);
	id_rule_finish(&rule);
	mosquitto_property_free_all(&list);
}

static void outcomes_are_counted(void **state)
{
	struct batch batch = {0};
	assert_int_equal(batch_count_outcome(&batch, BATCH_OPEN), 0);
	for (int i = 0; i < 100; i++)
		add(&batch, "t", "1", 1, MAX_PAYLOAD);
	assert_int_equal(batch_count_outcome(&batch, BATCH_OPEN), 100);
	for (int i = 0; i < 60; i++)
		batch.messages[i].outcome = i < 20 ? BATCH_DEAD_LETTERED : BATCH_STORED;
	assert_int_equal(batch_count_outcome(&batch, BATCH_DEAD_LETTERED), 20);
	assert_int_equal(batch_count_outcome(&batch, BATCH_STORED), 40);
	assert_int_equal(batch_count_outcome(&batch, BATCH_OPEN), 40);
	batch_finish(&batch);
}

/* Nothing of the last round shows in the next one. */
static void reset_forgets(void **state)
{
	struct batch batch = {0};
	for (int i = 0; i < 100; i++) {
		struct message message = message_of("first", "11111", 5);
		message.retain = message.dup = true;
		batch_add(&batch, &message, &object_ids, 2, NOW);
		batch.messages[i].outcome = BATCH_DEAD_LETTERED;
		batch.messages[i].reason = 3;
	}
	batch_reset(&batch);
	assert_int_equal(batch.count, 0);
	assert_int_equal(batch.arena.length, 0);
	add(&batch, "second", "2", 1, MAX_PAYLOAD);
	assert_holds(&batch, 0, "second", "2", 1);
	assert_int_equal(batch.messages[0].outcome, BATCH_OPEN);
	assert_int_equal(batch.messages[0].reason, 0);
	assert_false(batch.messages[0].retain);
	assert_false(batch.messages[0].dup);
	assert_false(batch.messages[0].oversized);
	batch_finish(&batch);
}

static void a_usual_round_allocates_once(void **state)
{
	struct batch batch = {0};
	const void *arena = NULL, *messages = NULL;
	for (int round = 0; round < 10; round++) {
		for (int i = 0; i < 2000; i++)
			add(&batch, "sensors/device-001", "{\"temperature\": 21.5}", 21, MAX_PAYLOAD);
		if (round > 0) {
			assert_ptr_equal(batch.arena.data, arena);
			assert_ptr_equal(batch.messages, messages);
		}
		arena = batch.arena.data;
		messages = batch.messages;
		batch_reset(&batch);
	}
	batch_finish(&batch);
}

static void a_large_round_gives_memory_back(void **state)
{
	struct batch batch = {0};
	add_letters(&batch, 15 * MIB, 15 * MIB);
	batch_reset(&batch);
	assert_true(batch.arena.capacity <= 2 * MIB);
	batch_finish(&batch);
}

static void finish_leaves_an_empty_batch(void **state)
{
	struct batch batch = {0};
	batch_finish(&batch);
	add(&batch, "t", "1", 1, MAX_PAYLOAD);
	batch_finish(&batch);
	assert_int_equal(batch.count, 0);
	assert_null(batch.messages);
	add(&batch, "t", "1", 1, MAX_PAYLOAD);
	assert_int_equal(batch.count, 1);
	batch_finish(&batch);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(a_message_is_copied),
	    cmocka_unit_test(flags_are_each_messages_own),
	    cmocka_unit_test(empty_payload_and_bytes_of_all_kinds),
	    cmocka_unit_test(thousands_do_not_mix),
	    cmocka_unit_test(every_message_has_its_own_id),
	    cmocka_unit_test(the_limit_itself_is_not_too_large),
	    cmocka_unit_test(of_a_large_one_the_beginning_is_kept),
	    cmocka_unit_test(just_above_what_is_kept),
	    cmocka_unit_test(above_a_small_limit_all_is_kept),
	    cmocka_unit_test(named_properties_are_kept),
	    cmocka_unit_test(outcomes_are_counted),
	    cmocka_unit_test(reset_forgets),
	    cmocka_unit_test(a_usual_round_allocates_once),
	    cmocka_unit_test(a_large_round_gives_memory_back),
	    cmocka_unit_test(finish_leaves_an_empty_batch),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
