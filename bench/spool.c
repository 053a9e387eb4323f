/*
 * How fast the spool commits, reads and removes: spool PATH MESSAGES BATCH PAYLOAD_BYTES
 *
 * PATH must not exist; it is removed at the end. The sums are printed as messages a second.
 */
#include "spool.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void must(enum spool_result result, const char *error)
{
	if (result == SPOOL_OK)
		return;
	fprintf(stderr, "%s\n", error);
	exit(1);
}

static void fill(struct batch *batch, size_t count, const char *payload, size_t length)
{
	static const struct id_rule object_ids;
	struct message message = {.topic = "sensors/device-001/readings",
	                          .topic_length = 27,
	                          .payload = payload,
	                          .payload_length = length,
	                          .qos = 1};
	batch_reset(batch);
	for (size_t i = 0; i < count; i++)
		batch_add(batch, &message, &object_ids, (size_t)1024 * 1024, 1700000000000);
}

int main(int argc, char **argv)
{
	if (argc != 5) {
		fprintf(stderr, "usage: spool PATH MESSAGES BATCH PAYLOAD_BYTES\n");
		return 2;
	}
	size_t messages = strtoul(argv[2], NULL, 10), count = strtoul(argv[3], NULL, 10),
	       length = strtoul(argv[4], NULL, 10);
	struct config_spool config = {.path = argv[1], .max_size = (int64_t)1 << 40, .max_size_set = true};
	char error[512], *payload = malloc(length + 1);
	memset(payload, 'x', length);
	struct spool *spool = spool_open(&config, error, sizeof error);
	struct batch batch = {0};
	const struct batch *batches[] = {&batch};
	double committing = 0, reading = 0, removing = 0, longest = 0, start;
	for (size_t done = 0; done < messages; done += count) {
		fill(&batch, count, payload, length);
		start = now();
		must(spool_commit(spool, batches, 1, error, sizeof error), error);
		double took = now() - start;
		committing += took;
		longest = took > longest ? took : longest;
	}
	struct spool_status status;
	spool_status(spool, &status);
	spool_close(spool);
	start = now();
	spool = spool_open(&config, error, sizeof error);
	double opening = now() - start;
	for (size_t done = 0; done < messages; done += batch.count) {
		batch_reset(&batch);
		start = now();
		must(spool_read(spool, 0, &batch, count, SIZE_MAX, error, sizeof error), error);
		reading += now() - start;
		for (size_t i = 0; i < batch.count; i++)
			batch.messages[i].outcome = BATCH_STORED;
		start = now();
		must(spool_remove(spool, &batch, error, sizeof error), error);
		removing += now() - start;
	}
	printf("commit %.0f/s (longest %.0f ms), read %.0f/s, remove %.0f/s, open %.0f ms, %.0f bytes a message\n",
	       (double)messages / committing, longest * 1000, (double)messages / reading, (double)messages / removing,
	       opening * 1000, (double)status.bytes / (double)messages);
	spool_close(spool);
	unlink(argv[1]);
	free(payload);
	batch_finish(&batch);
	return 0;
}
