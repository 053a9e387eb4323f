/*
 * See letters.h. Of each dead letter only the beginning is copied, over the one before: the line is about the newest.
 * The timer is at rest in quiet times; the first one starts it with nothing to wait for, so that the line comes when
 * its whole batch has been counted.
 */
#include "letters.h"

#include "document.h"
#include "log.h"
#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOPIC_SHOWN = 200, PAYLOAD_SHOWN = 80 };

/* The beginning of something that others sent, any bytes. */
struct excerpt {
	char bytes[TOPIC_SHOWN > PAYLOAD_SHOWN ? TOPIC_SHOWN : PAYLOAD_SHOWN];
	size_t kept, length;
};

struct letters {
	const char *collection;
	uint64_t every_ms;
	uv_timer_t timer;
	uint64_t counts[DOCUMENT_REASONS]; /* since the last line */
	uint64_t total;
	enum document_reason reason; /* of the newest, as are the others */
	struct excerpt topic, payload;
	void (*stopped)(void *owner);
	void *owner;
};

static const char *remedy(enum document_reason reason)
{
	switch ((int)reason) {
	case JSON_EMPTY:
		return "an empty payload deletes a retained message and holds no data; if there are many, leave their "
		       "topics "
		       "out of consumer.topic";
	case JSON_SYNTAX:
		return "its sender has to send JSON";
	case JSON_UTF8:
		return "its sender has to send JSON in UTF-8";
	case JSON_DEPTH:
		return "MongoDB nests 100 levels deep, its sender has to send flatter JSON";
	case JSON_NUMBER_RANGE:
		return "no type of MongoDB holds the number, its sender has to send it as a text";
	case JSON_KEY_NUL:
		return "its sender has to leave \\u0000 out of the key";
	case JSON_TOO_LARGE:
		return "MongoDB takes no document above 16 MiB, its sender has to send it in parts";
	case DOCUMENT_TOPIC_UTF8:
		return "its sender has to use a topic in UTF-8";
	case DOCUMENT_PAYLOAD_SIZE:
		return "raise consumer.max_payload";
	case DOCUMENT_REFUSED:
		return "reason.message of the dead letter says what MongoDB has against it; mend the collection's "
		       "validator or "
		       "the sender, then --replay-dead-letters";
	case DOCUMENT_UNIQUE_INDEX:
		return "another document has its value of a unique index; drop the index if it should not have, then "
		       "--replay-dead-letters";
	case DOCUMENT_ID_CONFLICT:
		return "another message has the same id; make consumer.id of parts that are the message's own, then "
		       "--replay-dead-letters";
	default:
		return "see reason.message of the dead letter";
	}
}

static void keep(struct excerpt *excerpt, const char *bytes, size_t length, size_t most)
{
	excerpt->length = length;
	excerpt->kept = length < most ? length : most;
	memcpy(excerpt->bytes, bytes, excerpt->kept);
}

/* As text for the log, which escapes all but NUL. Allocated. */
static char *show(const struct excerpt *excerpt)
{
	size_t kept = excerpt->kept;
	bool cut = kept < excerpt->length;
	struct buffer text = {0};
	/* not in the middle of a character, which has three continuation bytes at most */
	for (int i = 0; cut && i < 3 && kept > 0 && ((unsigned char)excerpt->bytes[kept - 1] & 0xc0) == 0x80; i++)
		kept--;
	if (cut && kept > 0 && ((unsigned char)excerpt->bytes[kept - 1] & 0x80) != 0)
		kept--;
	for (size_t i = 0; i < kept; i++) {
		if (excerpt->bytes[i] != 0)
			buffer_append_byte(&text, (uint8_t)excerpt->bytes[i]);
		else
			buffer_append(&text, "\\x00", 4);
	}
	buffer_append(&text, cut ? "…" : "", cut ? sizeof "…" : 1);
	return (char *)text.data; /* with the NUL of the last one */
}

/* " (invalid_json 3, unique_index 1)" where there are several reasons, else "". Allocated. */
static char *show_reasons(const struct letters *letters)
{
	char *text = memory_string("");
	if (letters->counts[letters->reason] == letters->total)
		return text;
	for (int reason = 0; reason < DOCUMENT_REASONS; reason++) {
		if (letters->counts[reason] == 0)
			continue;
		char *longer = memory_format("%s%s%s %llu", text, text[0] != 0 ? ", " : " (",
		                             document_reason_name((enum document_reason)reason),
		                             (unsigned long long)letters->counts[reason]);
		free(text);
		text = longer;
	}
	char *closed = memory_format("%s)", text);
	free(text);
	return closed;
}

/* The payload comes last: whatever it says, it cannot pass for words of ours. */
static void say(struct letters *letters)
{
	if (letters->total == 0)
		return;
	char *reasons = show_reasons(letters), *topic = show(&letters->topic), *payload = show(&letters->payload);
	log_warn("consumer", "%llu new dead letter%s in %s%s; the newest: %s: %s; its topic: %s; its %zu bytes: %s",
	         (unsigned long long)letters->total, letters->total > 1 ? "s" : "", letters->collection, reasons,
	         document_reason_name(letters->reason), remedy(letters->reason), topic, letters->payload.length,
	         payload);
	free(reasons);
	free(topic);
	free(payload);
	memset(letters->counts, 0, sizeof letters->counts);
	letters->total = 0;
}

static void due(uv_timer_t *timer)
{
	struct letters *letters = container_of(timer, struct letters, timer);
	if (letters->total > 0) /* else it has become quiet */
		uv_timer_start(&letters->timer, due, letters->every_ms, 0);
	say(letters);
}

struct letters *letters_start(uv_loop_t *loop, const char *collection, uint64_t every_ms)
{
	struct letters *letters = memory_zeroed(1, sizeof *letters);
	letters->collection = collection;
	letters->every_ms = every_ms;
	uv_timer_init(loop, &letters->timer);
	return letters;
}

void letters_note(struct letters *letters, const struct batch *batch, const struct batch_message *message)
{
	letters->total++;
	letters->reason = (enum document_reason)message->reason;
	letters->counts[message->reason]++;
	keep(&letters->topic, batch_topic(batch, message), message->topic_length, TOPIC_SHOWN);
	keep(&letters->payload, batch_payload(batch, message), message->payload_length, PAYLOAD_SHOWN);
	letters->payload.length = message->full_length;
	if (!uv_is_active((uv_handle_t *)&letters->timer))
		uv_timer_start(&letters->timer, due, 0, 0);
}

static void timer_closed(uv_handle_t *handle)
{
	struct letters *letters = handle->data;
	void (*stopped)(void *) = letters->stopped;
	void *owner = letters->owner;
	free(letters);
	stopped(owner);
}

void letters_stop(struct letters *letters, void (*stopped)(void *owner), void *owner)
{
	say(letters);
	letters->stopped = stopped;
	letters->owner = owner;
	letters->timer.data = letters;
	uv_close((uv_handle_t *)&letters->timer, timer_closed);
}
