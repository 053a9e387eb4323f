/*
 * The database's ceiling: the documents that mqtt2mongo would store, made from nothing and inserted in batches of 1000
 * with w:majority, j:true.
 *
 *   insert URI DATABASE COLLECTION COUNT THREADS
 */
#include <mongoc/mongoc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { BATCH = 1000, DEVICES = 100 };

struct part {
	pthread_t thread;
	mongoc_client_pool_t *pool;
	const char *database, *collection;
	long first, end;
};

static int64_t now_ms(void)
{
	struct timespec time;
	clock_gettime(CLOCK_REALTIME, &time);
	return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

static bson_t *new_document(long sequence)
{
	bson_t *document = bson_new(), payload;
	bson_oid_t id;
	char device[32], topic[64];
	snprintf(device, sizeof device, "device-%05ld", sequence % DEVICES);
	snprintf(topic, sizeof topic, "bench/line-1/%s/readings", device);
	bson_oid_init(&id, NULL);
	BSON_APPEND_OID(document, "_id", &id);
	BSON_APPEND_UTF8(document, "topic", topic);
	BSON_APPEND_DOCUMENT_BEGIN(document, "payload", &payload);
	BSON_APPEND_UTF8(&payload, "device", device);
	BSON_APPEND_INT32(&payload, "sequence", (int32_t)sequence);
	BSON_APPEND_UTF8(&payload, "time", "2026-11-22T20:18:24.123Z");
	BSON_APPEND_DOUBLE(&payload, "temperature", 21.53);
	BSON_APPEND_BOOL(&payload, "online", true);
	bson_append_document_end(document, &payload);
	BSON_APPEND_DATE_TIME(document, "received_at", now_ms());
	BSON_APPEND_INT32(document, "qos", 1);
	BSON_APPEND_BOOL(document, "retain", false);
	BSON_APPEND_BOOL(document, "dup", false);
	return document;
}

static void insert_batch(mongoc_collection_t *collection, const bson_t *options, long first, long end)
{
	bson_t *documents[BATCH];
	bson_error_t error;
	size_t count = 0;
	for (long sequence = first; sequence < end; sequence++)
		documents[count++] = new_document(sequence);
	if (!mongoc_collection_insert_many(collection, (const bson_t **)documents, count, options, NULL, &error)) {
		fprintf(stderr, "insert: %s\n", error.message);
		exit(1);
	}
	for (size_t i = 0; i < count; i++)
		bson_destroy(documents[i]);
}

static void *insert_part(void *context)
{
	struct part *part = context;
	mongoc_client_t *client = mongoc_client_pool_pop(part->pool);
	mongoc_collection_t *collection = mongoc_client_get_collection(client, part->database, part->collection);
	bson_t *options = BCON_NEW("ordered", BCON_BOOL(false), "writeConcern", "{", "w", BCON_UTF8("majority"), "j",
	                           BCON_BOOL(true), "}");
	for (long first = part->first; first < part->end; first += BATCH)
		insert_batch(collection, options, first, first + BATCH < part->end ? first + BATCH : part->end);
	bson_destroy(options);
	mongoc_collection_destroy(collection);
	mongoc_client_pool_push(part->pool, client);
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc != 6)
		return 2;
	long count = atol(argv[4]), threads = atol(argv[5]);
	if (threads < 1 || threads > 64)
		return 2;
	mongoc_init();
	mongoc_uri_t *uri = mongoc_uri_new(argv[1]);
	if (uri == NULL)
		return 2;
	mongoc_client_pool_t *pool = mongoc_client_pool_new(uri);
	struct part parts[64];
	for (long i = 0; i < threads; i++) {
		parts[i] = (struct part){.pool = pool,
		                         .database = argv[2],
		                         .collection = argv[3],
		                         .first = count * i / threads,
		                         .end = count * (i + 1) / threads};
		if (pthread_create(&parts[i].thread, NULL, insert_part, &parts[i]) != 0)
			abort();
	}
	for (long i = 0; i < threads; i++)
		pthread_join(parts[i].thread, NULL);
	mongoc_client_pool_destroy(pool);
	mongoc_uri_destroy(uri);
	mongoc_cleanup();
	return 0;
}
