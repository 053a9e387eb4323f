/*
 * libFuzzer target for json_to_bson(). The input is read from a heap block of its own size, so that AddressSanitizer
 * sees a byte read too far. What is taken must be valid BSON, must fit a limit of exactly its size and no less, and
 * must be JSON to cJSON too; what is refused must say where and why, and leave nothing behind.
 *
 * Run: fuzz_json -max_len=4096 a-folder-for-finds tests/fuzz/corpus/json
 */
#include "json.h"

#include <bson/bson.h>
#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { CJSON_NUMBER = 63 };

static void require(bool holds, const char *what)
{
	if (holds)
		return;
	fprintf(stderr, "fuzz_json: %s\n", what);
	abort();
}

static void check_bson(const struct buffer *element)
{
	bson_t document;
	struct buffer bytes = {0};
	uint32_t length = (uint32_t)element->length + 5;
	for (int shift = 0; shift < 32; shift += 8)
		buffer_append_byte(&bytes, (uint8_t)(length >> shift));
	buffer_append(&bytes, element->data, element->length);
	buffer_append_byte(&bytes, 0);
	require(bson_init_static(&document, bytes.data, bytes.length), "length not that of a document");
	require(bson_validate(&document, BSON_VALIDATE_UTF8 | BSON_VALIDATE_UTF8_ALLOW_NULL, NULL), "not valid BSON");
	buffer_finish(&bytes);
}

static void check_limit(const char *text, size_t length, size_t needed)
{
	struct buffer out = {0};
	struct json_fault fault;
	require(json_to_bson(text, length, "value", needed, &out, &fault) == JSON_OK, "refused at its own size");
	out.length = 0;
	require(json_to_bson(text, length, "value", needed - 1, &out, &fault) == JSON_TOO_LARGE, "limit not kept");
	require(out.length == 0, "bytes left behind above the limit");
	buffer_finish(&out);
}

/* Unpatched, cJSON cuts numbers at 63 bytes. An accepted text has no NUL for strspn() to stop at. */
static bool has_long_number(const char *text)
{
	for (; *text != '\0'; text++) {
		if (strspn(text, "+-0123456789.eE") > CJSON_NUMBER)
			return true;
	}
	return false;
}

static void check_cjson(const char *text, size_t length)
{
	cJSON *item = cJSON_ParseWithLengthOpts(text, length + 1, NULL, true);
	require(item != NULL || has_long_number(text), "refused by cJSON");
	cJSON_Delete(item);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct buffer out = {0};
	struct json_fault fault;
	char *text = malloc(size + 1);
	require(text != NULL, "out of memory");
	if (size != 0)
		memcpy(text, data, size);
	text[size] = '\0';

	enum json_code code = json_to_bson(text, size, "value", SIZE_MAX, &out, &fault);

	require(fault.code == code && fault.offset <= size && fault.message != NULL, "fault not filled in");
	if (code == JSON_OK) {
		check_bson(&out);
		check_limit(text, size, out.length);
		check_cjson(text, size);
	} else {
		require(out.length == 0, "bytes left behind");
	}
	buffer_finish(&out);
	free(text);
	return 0;
}
