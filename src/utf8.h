/*
 * What is a well-formed UTF-8 character (RFC 3629 §4: no overlong form, no surrogate, nothing above U+10FFFF). One
 * place for payloads, topics, settings and log lines. Pure; in the header because json.c meets it inside its innermost
 * loop.
 *
 * All of it reads text that ends in a NUL, which is no continuation byte: a sequence cut short at the end is found
 * without a length.
 */
#ifndef MQTT2MONGO_UTF8_H
#define MQTT2MONGO_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* True when a well-formed sequence of two to four bytes starts at `at`. `*length` is its length, or how many bytes of
 * it are right. */
static inline bool utf8_sequence(const uint8_t *at, size_t *length)
{
	uint8_t lead = at[0];
	size_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
	uint8_t least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
	uint8_t most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
	*length = 0;
	if (lead < 0xC2 || lead > 0xF4)
		return false;
	for (*length = 1; *length < size; ++*length) {
		if (at[*length] < least || at[*length] > most)
			return false;
		least = 0x80;
		most = 0xBF;
	}
	return true;
}

/* The length in bytes of the character at `at`, one byte of ASCII included, or 0 when there is none. */
static inline size_t utf8_character(const uint8_t *at)
{
	size_t length;
	if (at[0] < 0x80)
		return 1;
	return utf8_sequence(at, &length) ? length : 0;
}

/* All of `length` bytes: UTF-8 without NUL, as MQTT wants its texts (MQTT 5 §1.5.4). */
static inline bool utf8_is_text(const char *text, size_t length)
{
	for (size_t at = 0; at < length;) {
		size_t step = text[at] != 0 ? utf8_character((const uint8_t *)text + at) : 0;
		if (step == 0)
			return false;
		at += step;
	}
	return true;
}

/* C0, DEL, and C1 (U+0080 to U+009F), which some terminals obey as well. `at` is a well-formed character. */
static inline bool utf8_is_control(const uint8_t *at)
{
	return at[0] < 0x20 || at[0] == 0x7f || (at[0] == 0xc2 && at[1] < 0xa0);
}

/* What does something to a terminal, or to the text around it, instead of being shown: the controls; the characters of
 * direction (U+061C, U+200E, U+200F, U+202A to U+202E, U+2066 to U+206F), which can make a line read as another; and
 * the separators of lines (U+2028, U+2029). `at` is a well-formed character. */
static inline bool utf8_misleads(const uint8_t *at)
{
	if (at[0] < 0x80 || at[0] == 0xc2)
		return utf8_is_control(at);
	if (at[0] == 0xd8)
		return at[1] == 0x9c;
	if (at[0] != 0xe2 || (at[1] != 0x80 && at[1] != 0x81))
		return false;
	return at[1] == 0x80 ? at[2] == 0x8e || at[2] == 0x8f || (at[2] >= 0xa8 && at[2] <= 0xae)
	                     : at[2] >= 0xa6 && at[2] <= 0xaf;
}

#endif
