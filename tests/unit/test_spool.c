/*
 * spool.c: what was committed is there after a crash, byte for byte; the disk space stays below its limit; a damaged
 * file gives what is left of it and never something else; whatever is wrong, the service gets a handle.
 *
 * fsync() and fdatasync() are this program's own: they fail when told to, and look at the sizes at the moment when most
 * is on disk. They do nothing else: no power is cut here, and the tests are quicker. SQLite's pwrite() is one of ours
 * where a full disk is played.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "clock.h"
#include "log.h"
#include "spool.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <sched.h>
#include <signal.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_PAYLOAD = 1024 * 1024, NOBODY = 65534 };
#define MIB ((int64_t)1024 * 1024)
#define ALL ((size_t)1 << 40)

static char directory[64], path[128], error[512];

static const char *const suffixes[] = {"", "-wal", "-shm", ".lock"};

static uint64_t seed; /* never 0 */

/* The next number of a sequence that follows from the seed (xorshift64), below `end`. */
static size_t chance(size_t end)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return end > 0 ? (size_t)(seed >> 11) % end : 0;
}

/* ---- the disk ---- */

static int sync_errno;          /* what fsync() and fdatasync() fail with, or 0 */
static void (*sync_hook)(void); /* called once by the next of them */
static int64_t most_bytes_seen; /* of file, WAL and index together */

static int64_t bytes_on_disk(void)
{
	int64_t bytes = 0;
	for (size_t i = 0; i < 3; i++) {
		char name[160];
		struct stat status;
		snprintf(name, sizeof name, "%s%s", path, suffixes[i]);
		bytes += stat(name, &status) == 0 ? status.st_size : 0;
	}
	return bytes;
}

static int sync_as_told(void)
{
	int64_t bytes = bytes_on_disk();
	void (*hook)(void) = sync_hook;
	sync_hook = NULL;
	if (hook != NULL)
		hook();
	if (bytes > most_bytes_seen)
		most_bytes_seen = bytes;
	errno = sync_errno;
	return sync_errno != 0 ? -1 : 0;
}

int fsync(int fd)
{
	return sync_as_told();
}

int fdatasync(int fildes)
{
	return sync_as_told();
}

static int write_errno;

static ssize_t write_as_told(int fd, const void *bytes, size_t count, off_t at)
{
	errno = write_errno;
	return write_errno != 0 ? -1 : pwrite(fd, bytes, count, at);
}

/* From now on SQLite's writes fail with that, as those of a full disk do; 0: no more. */
static void fail_writes(int reason)
{
	sqlite3_vfs *vfs = sqlite3_vfs_find(NULL);
	write_errno = reason;
	vfs->xSetSystemCall(vfs, "pwrite", reason != 0 ? (sqlite3_syscall_ptr)write_as_told : NULL);
	vfs->xSetSystemCall(vfs, "pwrite64", reason != 0 ? (sqlite3_syscall_ptr)write_as_told : NULL);
}

/* ---- a directory of its own for each test ---- */

static int make_directory(void **state)
{
	snprintf(directory, sizeof directory, "/tmp/test_spool-XXXXXX");
	error[0] = 0;
	sync_errno = 0;
	sync_hook = NULL;
	most_bytes_seen = 0;
	if (mkdtemp(directory) == NULL)
		return 1;
	snprintf(path, sizeof path, "%s/spool.db", directory);
	return 0;
}

static int remove_entry(const char *name, const struct stat *status, int flag, struct FTW *place)
{
	return remove(name);
}

static int remove_directory(void **state)
{
	fail_writes(0);
	sync_errno = 0;
	nftw(directory, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
	return 0;
}

static const char *with(const char *suffix)
{
	static char names[4][192];
	static size_t next;
	char *name = names[next++ % 4];
	snprintf(name, sizeof names[0], "%s%s", path, suffix);
	return name;
}

static size_t size_of(const char *name)
{
	struct stat status;
	return stat(name, &status) == 0 ? (size_t)status.st_size : 0;
}

/* How many files of the directory begin so. */
static int count_files(const char *prefix)
{
	int found = 0;
	DIR *entries = opendir(directory);
	assert_non_null(entries);
	for (const struct dirent *entry; (entry = readdir(entries)) != NULL;)
		found += strncmp(entry->d_name, prefix, strlen(prefix)) == 0;
	closedir(entries);
	return found;
}

static void put_bytes(const char *name, size_t at, const void *bytes, size_t length)
{
	int fd = open(name, O_RDWR | O_CREAT, 0600);
	assert_true(fd >= 0);
	assert_int_equal(pwrite(fd, bytes, length, (off_t)at), length);
	close(fd);
}

static uint8_t *content_of(const char *name, size_t *length)
{
	*length = size_of(name);
	uint8_t *bytes = malloc(*length + 1);
	int fd = open(name, O_RDONLY);
	assert_int_equal(read(fd, bytes, *length), *length);
	close(fd);
	return bytes;
}

static void copy_file(const char *from, const char *to)
{
	size_t length;
	uint8_t *bytes = content_of(from, &length);
	unlink(to);
	put_bytes(to, 0, bytes, length);
	free(bytes);
}

/* ---- spools and batches ---- */

static struct config_spool config_of(int64_t max_size)
{
	return (struct config_spool){.path = path, .max_size = max_size, .max_size_set = max_size > 0};
}

static struct spool *open_sized(int64_t max_size)
{
	struct config_spool config = config_of(max_size);
	struct spool *spool = spool_open(&config, error, sizeof error);
	if (spool == NULL)
		fail_msg("%s", error);
	return spool;
}

static struct spool *open_spool(void)
{
	return open_sized(256 * MIB);
}

static void expect(enum spool_result result)
{
	if (result != SPOOL_OK)
		fail_msg("%s", error);
}

static struct spool_status status_of(const struct spool *spool)
{
	struct spool_status status;
	spool_status(spool, &status);
	return status;
}

static struct batch_message *add_bytes(struct batch *batch, const char *topic, size_t topic_length, const void *payload,
                                       size_t length, size_t max_payload)
{
	struct message message = {
	    .topic = topic, .topic_length = topic_length, .payload = payload, .payload_length = length, .qos = 1};
	static const struct id_rule no_rule;
	batch_add(batch, &message, &no_rule, max_payload, 1700000000000 + (int64_t)batch->count);
	return &batch->messages[batch->count - 1];
}

/* A message that says its number, with a payload of about that size. */
static void add_number(struct batch *batch, int64_t number, size_t size)
{
	char *payload = malloc(size + 32);
	int length = snprintf(payload, 32, "%lld ", (long long)number);
	memset(payload + length, 'a' + (int)(number % 26), size);
	add_bytes(batch, "sensors/a", 9, payload, (size_t)length + size, MAX_PAYLOAD);
	free(payload);
}

static int64_t number_of(const struct batch *batch, size_t index)
{
	const struct batch_message *message = &batch->messages[index];
	const char *payload = batch_payload(batch, message);
	int64_t number = strtoll(payload, NULL, 10);
	const char *at = strchr(payload, ' ');
	assert_non_null(at);
	for (at++; at < payload + message->payload_length; at++)
		if (*at != 'a' + (int)(number % 26))
			fail_msg("message %lld is not what was written", (long long)number);
	return number;
}

static enum spool_result commit(struct spool *spool, const struct batch *batch)
{
	return spool_commit(spool, &batch, 1, error, sizeof error);
}

/* Commit messages first … last, `each` at a time. */
static void commit_numbers(struct spool *spool, int64_t first, int64_t last, int64_t each, size_t size)
{
	struct batch batch = {0};
	while (first <= last) {
		batch_reset(&batch);
		for (int64_t i = 0; i < each && first <= last; i++)
			add_number(&batch, first++, size);
		expect(commit(spool, &batch));
	}
	batch_finish(&batch);
}

static void read_batch(struct spool *spool, int64_t after, struct batch *batch, size_t most_count, size_t most_bytes)
{
	batch_reset(batch);
	expect(spool_read(spool, after, batch, most_count, most_bytes, error, sizeof error));
}

static void settle(struct batch *batch, enum batch_outcome outcome)
{
	for (size_t i = 0; i < batch->count; i++)
		batch->messages[i].outcome = (uint8_t)outcome;
}

static void remove_batch(struct spool *spool, struct batch *batch)
{
	settle(batch, BATCH_STORED);
	expect(spool_remove(spool, batch, error, sizeof error));
}

/* All that is in the spool, from its numbers: how many, the first, the last; each once and in order. */
struct numbers {
	int64_t count, first, last;
};
static struct numbers read_numbers(struct spool *spool)
{
	struct numbers numbers = {0};
	struct batch batch = {0};
	for (int64_t after = 0;; after = batch.messages[batch.count - 1].row) {
		read_batch(spool, after, &batch, 1000, ALL);
		if (batch.count == 0)
			break;
		for (size_t i = 0; i < batch.count; i++) {
			int64_t number = number_of(&batch, i);
			assert_true(number > numbers.last);
			assert_true(batch.messages[i].row > after);
			numbers.first = numbers.count++ == 0 ? number : numbers.first;
			numbers.last = number;
		}
	}
	batch_finish(&batch);
	return numbers;
}

static void assert_numbers(struct spool *spool, int64_t first, int64_t last)
{
	struct numbers numbers = read_numbers(spool);
	assert_int_equal(numbers.count, last - first + 1);
	assert_int_equal(numbers.first, first);
	assert_int_equal(numbers.last, last);
	assert_int_equal(status_of(spool).messages, numbers.count);
}

static void assert_empty(struct spool *spool)
{
	struct batch batch = {0};
	read_batch(spool, 0, &batch, 10, ALL);
	assert_int_equal(batch.count, 0);
	assert_int_equal(status_of(spool).messages, 0);
	assert_int_equal(status_of(spool).oldest_ms, 0);
	batch_finish(&batch);
}

static void assert_takes(struct spool *spool)
{
	struct batch batch = {0};
	add_number(&batch, 1000000, 10);
	expect(commit(spool, &batch));
	batch_finish(&batch);
}

/* Run `sql` on the file, which no spool has open. */
static void execute(const char *sql)
{
	sqlite3 *database;
	assert_int_equal(sqlite3_open(path, &database), SQLITE_OK);
	if (sqlite3_exec(database, sql, NULL, NULL, NULL) != SQLITE_OK)
		fail_msg("%s: %s", sql, sqlite3_errmsg(database));
	sqlite3_close(database);
}

static pid_t start_child(void)
{
	fflush(NULL);
	pid_t child = fork();
	if (child == 0)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return child;
}

static int child_status(pid_t child)
{
	int status;
	assert_int_equal(waitpid(child, &status, 0), child);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

/* ---- what goes in comes out ---- */

static void assert_same(const struct batch *one, size_t i, const struct batch *other, size_t j)
{
	const struct batch_message *a = &one->messages[i], *b = &other->messages[j];
	assert_int_equal(a->topic_length, b->topic_length);
	assert_memory_equal(batch_topic(one, a), batch_topic(other, b), a->topic_length + 1);
	assert_int_equal(a->payload_length, b->payload_length);
	assert_memory_equal(batch_payload(one, a), batch_payload(other, b), a->payload_length + 1);
	assert_int_equal(a->full_length, b->full_length);
	assert_memory_equal(a->id.bytes, b->id.bytes, 12);
	assert_true(a->received_at == b->received_at);
	assert_int_equal(a->qos, b->qos);
	assert_int_equal(a->retain, b->retain);
	assert_int_equal(a->dup, b->dup);
	assert_int_equal(a->oversized, b->oversized);
	if (a->oversized)
		assert_memory_equal(one->arena.data + a->digest, other->arena.data + b->digest, BATCH_DIGEST_BYTES);
}

static void add_all_kinds(struct batch *batch)
{
	static char large[3 * 1024 * 1024], topic[65000];
	memset(large, 'l', sizeof large);
	memset(topic, 't', sizeof topic);
	add_bytes(batch, "a", 1, "{}", 2, MAX_PAYLOAD);
	add_bytes(batch, "empty", 5, "", 0, MAX_PAYLOAD);
	add_bytes(batch, "nul", 3, "a\0b\0", 4, MAX_PAYLOAD)->retain = true;
	add_bytes(batch, "\xff\xfe", 2, "\xff", 1, MAX_PAYLOAD)->dup = true;
	add_bytes(batch, topic, sizeof topic, "1", 1, MAX_PAYLOAD)->qos = 0;
	add_bytes(batch, "cut", 3, large, sizeof large, MAX_PAYLOAD);
	add_bytes(batch, "over, but kept whole", 20, large, 100, 99)->tried = true;
	add_bytes(batch, "large", 5, large, sizeof large, sizeof large);
	for (size_t length = 3900; length < 4300; length += 7) /* around what a page holds */
		add_bytes(batch, "edge", 4, large, length, MAX_PAYLOAD);
}

static void every_byte_comes_back(void **state)
{
	struct batch batch = {0}, back = {0};
	struct spool *spool = open_spool();
	add_all_kinds(&batch);
	batch.messages[0].received_at = -1;
	expect(commit(spool, &batch));
	for (int reopened = 0; reopened < 2; reopened++) {
		read_batch(spool, 0, &back, 1000, ALL);
		assert_int_equal(back.count, batch.count);
		assert_null(back.route);
		for (size_t i = 0; i < batch.count; i++) {
			assert_same(&batch, i, &back, i);
			assert_true(back.messages[i].tried);
			assert_false(back.messages[i].settled);
			assert_int_equal(back.messages[i].outcome, BATCH_OPEN);
			assert_true(back.messages[i].row > (i > 0 ? back.messages[i - 1].row : 0));
		}
		assert_int_equal(status_of(spool).messages, batch.count);
		spool_close(spool);
		spool = open_spool();
	}
	assert_int_equal(count_files("spool.db.corrupt"), 0);
	spool_close(spool);
	batch_finish(&back);
	batch_finish(&batch);
}

static void several_batches_at_once(void **state)
{
	struct batch one = {0}, other = {0}, none = {0};
	const struct batch *batches[] = {&one, &none, &other};
	struct spool *spool = open_spool();
	add_number(&one, 1, 10);
	add_number(&one, 100, 10);
	add_number(&one, 2, 10);
	one.messages[1].settled = true;
	add_number(&other, 3, 10);
	expect(spool_commit(spool, batches, 3, error, sizeof error));
	assert_numbers(spool, 1, 3);
	one.messages[0].settled = one.messages[2].settled = true;
	expect(spool_commit(spool, batches, 2, error, sizeof error));
	expect(spool_commit(spool, batches, 0, error, sizeof error));
	assert_numbers(spool, 1, 3);
	spool_close(spool);
	batch_finish(&one);
	batch_finish(&other);
}

static void a_batch_of_one_route(void **state)
{
	static const char *const routes[] = {"a/#", "a/#", NULL, NULL, "b/+", "a/#"};
	struct batch batch = {0}, back = {0};
	struct spool *spool = open_spool();
	for (size_t i = 0; i < 6; i++) {
		batch_reset(&batch);
		batch.route = routes[i];
		add_number(&batch, (int64_t)i + 1, 10);
		expect(commit(spool, &batch));
	}
	static const size_t counts[] = {2, 2, 1, 1};
	int64_t after = 0, number = 1;
	for (size_t i = 0; i < 4; i++) {
		read_batch(spool, after, &back, 100, ALL);
		assert_int_equal(back.count, counts[i]);
		const char *route = routes[number - 1];
		if (route == NULL)
			assert_null(back.route);
		else
			assert_string_equal(back.route, route);
		for (size_t j = 0; j < back.count; j++)
			assert_int_equal(number_of(&back, j), number++);
		after = back.messages[back.count - 1].row;
	}
	read_batch(spool, after, &back, 100, ALL);
	assert_int_equal(back.count, 0);
	spool_close(spool);
	batch_finish(&back);
	batch_finish(&batch);
}

static void reading_stops_at_its_limits(void **state)
{
	struct batch back = {0};
	struct spool *spool = open_spool();
	commit_numbers(spool, 1, 100, 10, 1000);
	read_batch(spool, 0, &back, 7, ALL);
	assert_int_equal(back.count, 7);
	read_batch(spool, 0, &back, 100, 5200);
	assert_int_equal(back.count, 5);
	read_batch(spool, 0, &back, 100, 1);
	assert_int_equal(back.count, 1);
	read_batch(spool, back.messages[0].row, &back, 1, ALL);
	assert_int_equal(number_of(&back, 0), 2);
	read_batch(spool, INT64_MAX, &back, 1, ALL);
	assert_int_equal(back.count, 0);
	spool_close(spool);
	batch_finish(&back);
}

static void only_what_is_settled_is_removed(void **state)
{
	struct batch back = {0};
	struct spool *spool = open_spool();
	commit_numbers(spool, 1, 1000, 1000, 20);
	read_batch(spool, 0, &back, 1000, ALL);
	size_t open = 0;
	settle(&back, BATCH_DUPLICATE);
	for (size_t i = 0; i < back.count; i++)
		if (i % 7 == 0 || (i > 500 && i < 600)) {
			back.messages[i].outcome = BATCH_OPEN;
			open++;
		}
	expect(spool_remove(spool, &back, error, sizeof error));
	expect(spool_remove(spool, &back, error, sizeof error)); /* they are gone: nothing happens */
	assert_int_equal(status_of(spool).messages, open);
	assert_int_equal(read_numbers(spool).count, open);
	assert_int_equal(read_numbers(spool).first, 1);
	spool_close(spool);
	spool = open_spool();
	assert_int_equal(status_of(spool).messages, open);
	batch_reset(&back);
	expect(spool_remove(spool, &back, error, sizeof error));
	read_batch(spool, 0, &back, 1000, ALL);
	remove_batch(spool, &back);
	assert_empty(spool);
	spool_close(spool);
	batch_finish(&back);
}

static void rows_are_not_used_twice(void **state)
{
	struct batch back = {0};
	int64_t greatest = 0;
	for (int i = 0; i < 5; i++) {
		struct spool *spool = open_spool();
		commit_numbers(spool, 1, 10, 10, 10);
		read_batch(spool, 0, &back, 100, ALL);
		assert_int_equal(back.count, 10);
		assert_true(back.messages[0].row > greatest);
		greatest = back.messages[9].row;
		remove_batch(spool, &back);
		spool_close(spool);
	}
	batch_finish(&back);
}

static void the_status(void **state)
{
	struct batch back = {0};
	struct spool *spool = open_sized(10 * MIB);
	assert_empty(spool);
	assert_int_equal(status_of(spool).max_size, 10 * MIB);
	commit_numbers(spool, 1, 50, 50, 1000);
	assert_int_equal(status_of(spool).messages, 50);
	assert_true(status_of(spool).oldest_ms == 1700000000000);
	assert_int_equal(status_of(spool).bytes, bytes_on_disk());
	read_batch(spool, 0, &back, 10, ALL);
	remove_batch(spool, &back);
	assert_true(status_of(spool).oldest_ms == 1700000000010);
	spool_close(spool);
	spool = open_sized(0);
	assert_true(status_of(spool).oldest_ms == 1700000000010);
	assert_int_equal(status_of(spool).messages, 40);
	assert_in_range(status_of(spool).max_size, MIB, 1024 * MIB);
	spool_close(spool);
	spool_close(NULL);
	batch_finish(&back);
}

/* ---- the file ---- */

static void the_file_is_private(void **state)
{
	mode_t mask = umask(0);
	struct spool *spool = open_spool();
	umask(mask);
	commit_numbers(spool, 1, 10, 10, 10);
	for (size_t i = 0; i < 4; i++) {
		struct stat status;
		assert_int_equal(stat(with(suffixes[i]), &status), 0);
		assert_int_equal(status.st_mode & 0777, 0600);
	}
	spool_close(spool);
}

static void one_service_for_a_spool(void **state)
{
	struct config_spool config = config_of(10 * MIB);
	struct spool *spool = open_spool();
	char holder[64];
	snprintf(holder, sizeof holder, "process %ld", (long)getpid());
	for (int i = 0; i < 2; i++) {
		assert_null(spool_open(&config, error, sizeof error));
		assert_non_null(strstr(error, holder));
		assert_non_null(strstr(error, path));
		assert_non_null(strstr(error, "spool.path"));
		assert_non_null(strstr(error, "state_dir"));
	}
	commit_numbers(spool, 1, 10, 10, 10);
	spool_close(spool);
	spool = open_spool();
	assert_numbers(spool, 1, 10);
	spool_close(spool);
}

static void an_empty_file(void **state)
{
	put_bytes(path, 0, "", 0);
	struct spool *spool = open_spool();
	commit_numbers(spool, 1, 10, 10, 10);
	assert_numbers(spool, 1, 10);
	assert_int_equal(count_files("spool.db.corrupt"), 0);
	spool_close(spool);
}

static void assert_set_aside(const void *bytes, size_t length)
{
	struct spool *spool = open_spool();
	assert_empty(spool);
	commit_numbers(spool, 1, 10, 10, 10);
	assert_numbers(spool, 1, 10);
	spool_close(spool);
	assert_true(count_files("spool.db.corrupt-20") >= 1);
	assert_int_equal(count_files("spool.db.recover"), 0);
	DIR *entries = opendir(directory);
	for (const struct dirent *entry; (entry = readdir(entries)) != NULL;) {
		char name[512];
		snprintf(name, sizeof name, "%s/%s", directory, entry->d_name);
		if (strncmp(entry->d_name, "spool.db.corrupt-20", 19) == 0 && strstr(entry->d_name, "-wal") == NULL) {
			size_t kept;
			uint8_t *content = content_of(name, &kept);
			assert_int_equal(kept, length);
			assert_memory_equal(content, bytes, length);
			free(content);
		}
	}
	closedir(entries);
}

static void a_foreign_file(void **state)
{
	static const char text[] = "This is somebody's letter and no database at all. It is kept as it is.";
	put_bytes(path, 0, text, sizeof text);
	assert_set_aside(text, sizeof text);
}

static void a_foreign_database(void **state)
{
	size_t length;
	execute("CREATE TABLE letters (text); INSERT INTO letters VALUES ('dear'); PRAGMA application_id = 7");
	uint8_t *bytes = content_of(path, &length);
	assert_set_aside(bytes, length);
	free(bytes);
}

static void a_foreign_database_with_our_table(void **state)
{
	size_t length;
	execute("CREATE TABLE message (row INTEGER PRIMARY KEY, id, route, topic, payload, received_at, qos, flags, "
	        "full_length, digest, properties, checksum); INSERT INTO message (row, payload) VALUES (1, 'x')");
	uint8_t *bytes = content_of(path, &length);
	assert_set_aside(bytes, length);
	free(bytes);
}

/* Of a later version: what is left of it goes on, and the file is kept. */
static void a_newer_format(void **state)
{
	struct spool *spool = open_spool();
	commit_numbers(spool, 1, 10, 10, 10);
	spool_close(spool);
	execute("PRAGMA user_version = 2");
	spool = open_spool();
	assert_numbers(spool, 1, 10);
	assert_int_equal(count_files("spool.db.corrupt-20"), 1);
	spool_close(spool);
}

static void a_page_size_of_somebody_else(void **state)
{
	struct spool *spool = open_spool();
	commit_numbers(spool, 1, 1000, 100, 100);
	spool_close(spool);
	execute("PRAGMA journal_mode = DELETE; PRAGMA page_size = 8192; VACUUM");
	spool = open_spool();
	assert_numbers(spool, 1, 1000);
	spool_close(spool);
}

/* ---- when the file cannot be used ---- */

static void assert_unusable(struct spool *spool, const char *why)
{
	struct batch batch = {0}, back = {0};
	assert_int_equal(spool_test(spool, error, sizeof error), SPOOL_FAILED);
	assert_non_null(strstr(error, path));
	if (strstr(error, why) == NULL)
		fail_msg("%s", error);
	add_number(&batch, 1, 10);
	assert_int_equal(commit(spool, &batch), SPOOL_FAILED);
	assert_int_equal(spool_read(spool, 0, &back, 1, 1, error, sizeof error), SPOOL_FAILED);
	assert_int_equal(spool_remove(spool, &batch, error, sizeof error), SPOOL_FAILED);
	assert_int_equal(status_of(spool).messages, 0);
	batch_finish(&batch);
	batch_finish(&back);
}

static void assert_usable(struct spool *spool)
{
	expect(spool_test(spool, error, sizeof error));
	commit_numbers(spool, 1, 10, 10, 10);
	assert_numbers(spool, 1, 10);
}

static void a_directory_in_its_place(void **state)
{
	assert_int_equal(mkdir(path, 0700), 0);
	struct spool *spool = open_spool();
	assert_unusable(spool, "");
	assert_int_equal(rmdir(path), 0);
	assert_usable(spool);
	spool_close(spool);
}

static void a_directory_that_comes_later(void **state)
{
	snprintf(path, sizeof path, "%s/later/spool.db", directory);
	struct spool *spool = open_spool();
	assert_unusable(spool, "No such file or directory");
	snprintf(path, sizeof path, "%s/later", directory);
	assert_int_equal(mkdir(path, 0700), 0);
	snprintf(path, sizeof path, "%s/later/spool.db", directory);
	assert_usable(spool);
	spool_close(spool);
}

/* As nobody, for root may write everywhere: in a child, whose first failure is its exit status. */
static void no_permission(void **state)
{
	struct spool *spool = open_spool();
	commit_numbers(spool, 1, 10, 10, 10);
	spool_close(spool);
	chmod(directory, 0555);
	chmod(path, 0444);
	chmod(with(".lock"), 0666);
	pid_t child = start_child();
	if (child == 0) {
		struct config_spool config = config_of(10 * MIB);
		if (geteuid() == 0 && setresuid(NOBODY, NOBODY, NOBODY) != 0)
			_exit(1);
		spool = spool_open(&config, error, sizeof error);
		if (spool == NULL)
			_exit(2);
		if (spool_test(spool, error, sizeof error) != SPOOL_FAILED)
			_exit(3);
		_exit(strstr(error, path) == NULL ? 4 : 0);
	}
	assert_int_equal(child_status(child), 0);
	chmod(directory, 0755);
	chmod(path, 0600);
	spool = open_spool();
	assert_numbers(spool, 1, 10);
	assert_int_equal(count_files("spool.db.corrupt"), 0);
	spool_close(spool);
}

/* ---- when the disk fails ---- */

static void an_fsync_that_fails(void **state)
{
	struct batch batch = {0};
	struct spool *spool = open_spool();
	int64_t numbers = 0;
	for (int round = 0; round < 3; round++) {
		commit_numbers(spool, numbers + 1, numbers + 10, 10, 100);
		numbers += 10;
		batch_reset(&batch);
		add_number(&batch, 1000000, 100);
		sync_errno = round == 1 ? ENOSPC : EIO;
		assert_int_equal(commit(spool, &batch), SPOOL_FAILED);
		assert_non_null(strstr(error, path));
		assert_int_equal(status_of(spool).messages, numbers);
		assert_int_equal(commit(spool, &batch), SPOOL_FAILED);
		assert_int_not_equal(spool_test(spool, error, sizeof error), SPOOL_OK);
		sync_errno = 0;
		assert_int_equal(commit(spool, &batch), SPOOL_FAILED);
		expect(spool_test(spool, error, sizeof error));
		assert_true(status_of(spool).messages == (uint64_t)numbers ||
		            status_of(spool).messages == (uint64_t)numbers + 1);
		/* What was refused may have come back, under its own id. It goes, for the next round to be simple. */
		struct batch back = {0};
		read_batch(spool, 0, &back, 1000, ALL);
		assert_true(back.count >= (size_t)numbers);
		for (int64_t i = 0; i < numbers; i++)
			assert_int_equal(number_of(&back, (size_t)i), i + 1);
		for (size_t i = (size_t)numbers; i < back.count; i++)
			back.messages[i].outcome = BATCH_STORED;
		expect(spool_remove(spool, &back, error, sizeof error));
		batch_finish(&back);
	}
	assert_numbers(spool, 1, numbers);
	spool_close(spool);
	spool = open_spool();
	assert_numbers(spool, 1, numbers);
	spool_close(spool);
	batch_finish(&batch);
}

/* The fsyncs of a checkpoint fail: what was committed before stays. */
static void an_fsync_that_fails_while_closing(void **state)
{
	struct spool *spool = open_spool();
	commit_numbers(spool, 1, 1000, 100, 100);
	sync_errno = EIO;
	spool_close(spool);
	sync_errno = 0;
	spool = open_spool();
	assert_numbers(spool, 1, 1000);
	spool_close(spool);
}

static void a_full_disk(void **state)
{
	static const int reasons[] = {ENOSPC, EDQUOT, EIO, EROFS};
	struct batch batch = {0}, back = {0};
	struct spool *spool = open_spool();
	commit_numbers(spool, 1, 100, 10, 1000);
	add_number(&batch, 101, 1000);
	for (size_t i = 0; i < 4; i++) {
		enum spool_result expected = reasons[i] == ENOSPC || reasons[i] == EDQUOT ? SPOOL_FULL : SPOOL_FAILED;
		fail_writes(reasons[i]);
		assert_int_equal(commit(spool, &batch), expected);
		assert_int_equal(status_of(spool).messages, 100);
		assert_int_not_equal(spool_test(spool, error, sizeof error), SPOOL_OK);
		if (expected == SPOOL_FULL) {
			read_batch(spool, 0, &back, 10, ALL);
			settle(&back, BATCH_STORED);
			assert_int_equal(spool_remove(spool, &back, error, sizeof error), SPOOL_FULL);
		}
		fail_writes(0);
		expect(spool_test(spool, error, sizeof error));
		assert_numbers(spool, 1, 100);
	}
	expect(commit(spool, &batch));
	assert_numbers(spool, 1, 101);
	spool_close(spool);
	batch_finish(&batch);
	batch_finish(&back);
}

/* In a child with a file system of its own: 16 MiB that something else fills. No step may raise SIGBUS. */
static void fill_disk(const char *name, bool leave)
{
	static char zeros[4096];
	int fd = open(name, O_WRONLY | O_CREAT, 0600);
	lseek(fd, 0, SEEK_END);
	while (write(fd, zeros, sizeof zeros) > 0)
		;
	if (leave && ftruncate(fd, lseek(fd, 0, SEEK_CUR) - (off_t)100 * 4096) != 0)
		_exit(20);
	close(fd);
}

static int on_a_full_file_system(void)
{
	struct config_spool config = config_of(64 * MIB);
	struct batch batch = {0}, back = {0};
	char filler[128];
	snprintf(filler, sizeof filler, "%s/filler", directory);
	if (unshare(CLONE_NEWNS) != 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0)
		return 77;
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
	    mount("tmpfs", directory, "tmpfs", 0, "size=16m,mode=700") != 0)
		return 77;
	/* From the first page on there is no room: it starts, and takes messages when there is some. */
	fill_disk(filler, false);
	struct spool *spool = spool_open(&config, error, sizeof error);
	if (spool == NULL)
		return 1;
	if (spool_test(spool, error, sizeof error) == SPOOL_OK)
		return 2;
	unlink(filler);
	if (spool_test(spool, error, sizeof error) != SPOOL_OK)
		return 3;
	int64_t committed = 0;
	for (int round = 0; round < 40; round++) {
		fill_disk(filler, round % 2 == 0);
		enum spool_result result = SPOOL_OK;
		for (int i = 0; i < 200 && result == SPOOL_OK; i++) {
			batch_reset(&batch);
			for (int j = 0; j < 100; j++)
				add_number(&batch, committed + j + 1, 100);
			result = commit(spool, &batch);
			committed += result == SPOOL_OK ? 100 : 0;
		}
		if (result != SPOOL_FULL)
			return 4;
		/* Cutting its log short may have made room: then what was refused is taken. */
		if (spool_test(spool, error, sizeof error) == SPOOL_OK && round % 2 != 0) {
			if (commit(spool, &batch) != SPOOL_OK)
				return 5;
			committed += 100;
		}
		/* Open once more on the full disk; what was committed is there. */
		if (round % 4 == 0) {
			spool_close(spool);
			spool = spool_open(&config, error, sizeof error);
			if (spool == NULL)
				return 6;
		}
		unlink(filler);
		if (spool_test(spool, error, sizeof error) != SPOOL_OK)
			return 7;
		if (status_of(spool).messages != (uint64_t)committed)
			return 8;
		if (committed > 20000) {
			while (status_of(spool).messages > 0) {
				batch_reset(&back);
				if (spool_read(spool, 0, &back, 1000, ALL, error, sizeof error) != SPOOL_OK)
					return 9;
				settle(&back, BATCH_STORED);
				if (spool_remove(spool, &back, error, sizeof error) != SPOOL_OK)
					return 10;
			}
			committed = 0;
		}
	}
	spool_close(spool);
	batch_finish(&batch);
	batch_finish(&back);
	return 0;
}

static void a_file_system_that_is_full(void **state)
{
	pid_t child = start_child();
	if (child == 0) {
		log_configure(LOG_LEVEL_ERROR + 1, LOG_FORMAT_TEXT);
		_exit(on_a_full_file_system());
	}
	int status = child_status(child);
	if (status == 77)
		print_message("no file system of its own here: not tried\n");
	else
		assert_int_equal(status, 0);
}

/* ---- the limit ---- */

static void full_and_empty_again(void **state)
{
	for (int64_t size = 1; size <= 16; size *= 4) {
		struct batch batch = {0}, back = {0};
		struct spool *spool = open_sized(size * MIB);
		int64_t committed = 0, taken_at_first = 0;
		for (int round = 0; round < 4; round++) {
			enum spool_result result = SPOOL_OK;
			while (result == SPOOL_OK) {
				batch_reset(&batch);
				for (int i = 0; i < 100; i++)
					add_number(&batch, committed + i + 1, 100);
				result = commit(spool, &batch);
				committed += result == SPOOL_OK ? 100 : 0;
			}
			assert_int_equal(result, SPOOL_FULL);
			assert_non_null(strstr(error, "spool.max_size"));
			assert_non_null(strstr(error, path));
			assert_int_equal(status_of(spool).messages, committed);
			if (round == 0)
				taken_at_first = committed;
			assert_true(committed * 10 >= taken_at_first * 9);
			assert_true(committed * 140 * 10 >= size * MIB * 5); /* at least half of it is messages */
			assert_int_equal(spool_test(spool, error, sizeof error), SPOOL_FULL);
			assert_true(bytes_on_disk() <= size * MIB);
			if (round % 2 == 0) {
				spool_close(spool);
				spool = open_sized(size * MIB);
			}
			read_batch(spool, 0, &back, (size_t)committed / 2, ALL);
			remove_batch(spool, &back);
			expect(spool_test(spool, error, sizeof error));
			read_batch(spool, 0, &back, (size_t)committed, ALL);
			remove_batch(spool, &back);
			expect(spool_test(spool, error, sizeof error));
			assert_empty(spool);
			assert_true(bytes_on_disk() <= MIB); /* the disk is given back */
			committed = 0;
		}
		assert_true(most_bytes_seen <= size * MIB);
		spool_close(spool);
		batch_finish(&batch);
		batch_finish(&back);
		unlink(path);
		most_bytes_seen = 0;
	}
}

/* The limit was lowered below what there is: what is there can be removed, and then it takes messages again. */
static void a_lower_limit(void **state)
{
	struct batch batch = {0}, back = {0};
	struct spool *spool = open_sized(64 * MIB);
	commit_numbers(spool, 1, 20000, 1000, 300);
	spool_close(spool);
	spool = open_sized(MIB);
	add_number(&batch, 1, 10);
	assert_int_equal(commit(spool, &batch), SPOOL_FULL);
	while (status_of(spool).messages > 0) {
		read_batch(spool, 0, &back, 3000, ALL);
		remove_batch(spool, &back);
	}
	assert_true(bytes_on_disk() <= MIB);
	expect(spool_test(spool, error, sizeof error));
	expect(commit(spool, &batch));
	spool_close(spool);
	batch_finish(&batch);
	batch_finish(&back);
}

/* A transaction larger than the whole spool is refused, but does not stand in the way of smaller ones. */
static void more_than_ever_fits(void **state)
{
	struct batch batch = {0};
	struct spool *spool = open_sized(MIB);
	for (int i = 0; i < 20; i++)
		add_number(&batch, i, 100000);
	assert_int_equal(commit(spool, &batch), SPOOL_FULL);
	expect(spool_test(spool, error, sizeof error));
	assert_takes(spool);
	spool_close(spool);
	batch_finish(&batch);
}

static void never_above_the_limit(void **state)
{
	static const size_t sizes[] = {0, 50, 110, 700, 2100, 3000, 4100, 9000, 70000};
	for (unsigned round = 1; round <= 12; round++) {
		struct batch batch = {0}, back = {0};
		int64_t limit = (int64_t)(round % 4 + 1) * MIB, number = 0, full = 0;
		struct spool *spool = open_sized(limit);
		seed = round;
		for (int i = 0; i < 400; i++) {
			if (chance(3) > 0) {
				batch_reset(&batch);
				for (size_t j = chance(200); j < 200; j++)
					add_number(&batch, ++number, sizes[chance(9)] % (1 + chance(80000)));
				full += commit(spool, &batch) == SPOOL_FULL;
			}
			if (chance(3) > (size_t)(i / 100 % 2)) {
				read_batch(spool, 0, &back, chance(500) + 1, ALL);
				settle(&back, BATCH_STORED);
				for (size_t j = 0; j < back.count; j++)
					if (chance(10) == 0)
						back.messages[j].outcome = BATCH_OPEN;
				expect(spool_remove(spool, &back, error, sizeof error));
			}
			if (bytes_on_disk() > limit || most_bytes_seen > limit)
				fail_msg("round %u, step %d: %lld bytes, at most %lld, allowed %lld", round, i,
				         (long long)bytes_on_disk(), (long long)most_bytes_seen, (long long)limit);
			if (i % 97 == 0) {
				spool_close(spool);
				spool = open_sized(limit);
			}
		}
		assert_true(full > 0);
		assert_int_equal(read_numbers(spool).count, status_of(spool).messages);
		spool_close(spool);
		unlink(path);
		most_bytes_seen = 0;
		batch_finish(&batch);
		batch_finish(&back);
	}
}

/* ---- kill -9 ---- */

/* What the child says: it has committed up to here; it is about to remove up to there. */
struct progress {
	int64_t committed, removing;
};

static void work_until_killed(int pipe_end, int64_t number)
{
	struct config_spool config = config_of(64 * MIB);
	struct batch batch = {0}, back = {0};
	struct spool *spool = spool_open(&config, error, sizeof error);
	struct progress progress = {.committed = number};
	while (spool != NULL) {
		batch_reset(&batch);
		for (size_t i = chance(300); i < 300; i++)
			add_number(&batch, ++number, chance(500));
		if (commit(spool, &batch) != SPOOL_OK)
			_exit(1);
		progress.committed = number;
		if (write(pipe_end, &progress, sizeof progress) != sizeof progress)
			_exit(2);
		if (status_of(spool).messages < 3000)
			continue;
		batch_reset(&back);
		if (spool_read(spool, 0, &back, chance(2000) + 1, ALL, error, sizeof error) != SPOOL_OK)
			_exit(3);
		progress.removing = number_of(&back, back.count - 1);
		if (write(pipe_end, &progress, sizeof progress) != sizeof progress)
			_exit(4);
		settle(&back, BATCH_STORED);
		if (spool_remove(spool, &back, error, sizeof error) != SPOOL_OK)
			_exit(5);
	}
	_exit(6);
}

static void drain(struct spool *spool)
{
	struct batch back = {0};
	for (read_batch(spool, 0, &back, 1000, ALL); back.count > 0; read_batch(spool, 0, &back, 1000, ALL))
		remove_batch(spool, &back);
	batch_finish(&back);
}

/* A kill between the two writes of a transaction's last frame leaves what damage leaves: then those of its rows that
 * are whole are taken, although nobody was told so far that they are kept. */
static void killed_at_any_moment(void **state)
{
	struct progress last = {0}, progress;
	seed = (uint64_t)getpid();
	for (unsigned i = 0; i < 60; i++) {
		int ends[2];
		assert_int_equal(pipe(ends), 0);
		pid_t child = start_child();
		if (child == 0) {
			close(ends[0]);
			seed = i + 1;
			work_until_killed(ends[1], last.committed);
		}
		close(ends[1]);
		usleep((useconds_t)chance(60000));
		kill(child, SIGKILL);
		while (read(ends[0], &progress, sizeof progress) == sizeof progress) {
			last.committed = progress.committed;
			last.removing = progress.removing > last.removing ? progress.removing : last.removing;
		}
		close(ends[0]);
		assert_int_equal(child_status(child), 1000 + SIGKILL);
		struct spool *spool = open_spool();
		struct numbers numbers = read_numbers(spool);
		assert_int_equal(numbers.count, status_of(spool).messages);
		if (numbers.count > 0) {
			int64_t missing = numbers.last - numbers.first + 1 - numbers.count;
			assert_true(numbers.last >= last.committed);
			assert_true(missing == 0 || missing < numbers.last - last.committed);
			assert_true(numbers.first <= last.removing + 1);
			last.committed = numbers.last;
			if (missing > 0) {
				drain(spool);
				last.removing = last.committed;
			}
		} else {
			assert_true(last.removing >= last.committed);
		}
		assert_int_equal(count_files("spool.db.corrupt"), 0);
		spool_close(spool);
	}
	assert_true(last.committed > 1000);
}

/* ---- damage ---- */

/* A spool of `count` numbers, some in the file and some in the WAL, as a crash leaves it: the files under PATH.good. */
static void make_crashed(int64_t count)
{
	pid_t child = start_child();
	if (child == 0) {
		struct spool *spool = open_spool();
		commit_numbers(spool, 1, count / 2, 100, 150);
		spool_close(spool);
		spool = open_spool();
		commit_numbers(spool, count / 2 + 1, count, 100, 150);
		copy_file(path, with(".good"));
		copy_file(with("-wal"), with("-wal.good"));
		_exit(0);
	}
	assert_int_equal(child_status(child), 0);
}

static void restore_crashed(void)
{
	DIR *entries = opendir(directory);
	for (const struct dirent *entry; (entry = readdir(entries)) != NULL;) {
		char name[512];
		snprintf(name, sizeof name, "%s/%s", directory, entry->d_name);
		if (entry->d_name[0] != '.' && strstr(name, ".good") == NULL)
			unlink(name);
	}
	closedir(entries);
	copy_file(with(".good"), path);
	copy_file(with("-wal.good"), with("-wal"));
}

/* It opens, gives only what was written, in order, each once, and takes more. How many it gives. */
static int64_t open_damaged(void)
{
	struct spool *spool = open_spool();
	struct numbers numbers = {0};
	struct batch batch = {0};
	enum spool_result result = SPOOL_OK;
	/* Damage may show when the rows are read: then it is recovered by the next test. */
	for (int64_t after = 0;; after = batch.messages[batch.count - 1].row) {
		batch_reset(&batch);
		result = spool_read(spool, after, &batch, 1000, ALL, error, sizeof error);
		if (result != SPOOL_OK || batch.count == 0)
			break;
	}
	if (result != SPOOL_OK)
		expect(spool_test(spool, error, sizeof error));
	numbers = read_numbers(spool);
	assert_int_equal(status_of(spool).messages, numbers.count);
	assert_true(numbers.last <= 1000000);
	assert_takes(spool);
	spool_close(spool);
	spool = open_spool();
	assert_int_equal(read_numbers(spool).count, numbers.count + 1);
	spool_close(spool);
	batch_finish(&batch);
	return numbers.count;
}

static void a_crash_loses_nothing(void **state)
{
	make_crashed(2000);
	restore_crashed();
	assert_int_equal(open_damaged(), 2000);
	assert_int_equal(count_files("spool.db.corrupt"), 0);
}

static void truncated_anywhere(void **state)
{
	int64_t recovered = 0;
	seed = 1;
	make_crashed(2000);
	size_t length = size_of(with(".good"));
	for (int i = 0; i < 50; i++) {
		size_t kept = i == 0 ? 0 : chance(length);
		restore_crashed();
		assert_int_equal(truncate(path, (off_t)kept), 0);
		int64_t count = open_damaged();
		recovered += count;
		/* The WAL has the later half, and of the file each whole page its rows. */
		if (count < 900)
			fail_msg("%lld messages of 2000, cut at %zu of %zu", (long long)count, kept, length);
	}
	assert_true(recovered > (int64_t)50 * 1300);
}

static void a_truncated_wal(void **state)
{
	seed = 2;
	make_crashed(2000);
	size_t length = size_of(with("-wal.good"));
	for (int i = 0; i < 20; i++) {
		restore_crashed();
		assert_int_equal(truncate(with("-wal"), (off_t)(chance(length))), 0);
		assert_true(open_damaged() >= 1000);
	}
}

static void without_its_file(void **state)
{
	make_crashed(2000);
	restore_crashed();
	unlink(path);
	assert_true(open_damaged() >= 1000);
}

static void flip_bits(const char *name, int count)
{
	size_t length = size_of(name);
	for (int i = 0; i < count; i++) {
		uint8_t byte;
		size_t at = chance(length);
		int fd = open(name, O_RDWR);
		assert_int_equal(pread(fd, &byte, 1, (off_t)at), 1);
		byte ^= (uint8_t)(1 << chance(8));
		assert_int_equal(pwrite(fd, &byte, 1, (off_t)at), 1);
		close(fd);
	}
}

/* One bit costs at most the rows of one page, here 25; in the file's first page none. */
static void flipped_bits(void **state)
{
	seed = 3;
	make_crashed(2000);
	for (int i = 0; i < 150; i++) {
		restore_crashed();
		flip_bits(i % 3 == 0 ? with("-wal") : path, 1);
		int64_t count = open_damaged();
		if (count < 1970)
			fail_msg("%lld messages of 2000 after one flipped bit, round %d", (long long)count, i);
	}
	for (int i = 0; i < 50; i++) {
		restore_crashed();
		flip_bits(path, 10);
		flip_bits(with("-wal"), 10);
		assert_true(open_damaged() >= 1000);
	}
}

static void every_bit_of_the_header(void **state)
{
	make_crashed(200);
	for (size_t at = 0; at < 100; at++) {
		uint8_t byte;
		restore_crashed();
		int fd = open(path, O_RDWR);
		assert_int_equal(pread(fd, &byte, 1, (off_t)at), 1);
		byte ^= (uint8_t)(1 << at % 8);
		assert_int_equal(pwrite(fd, &byte, 1, (off_t)at), 1);
		close(fd);
		assert_int_equal(open_damaged(), 200);
	}
}

/* SQLite notices nothing: the checksum does. */
static void a_row_that_was_changed(void **state)
{
	static const char *const changes[] = {"payload = CAST(replace(payload, 'm', 'x') AS BLOB)",
	                                      "topic = CAST('sensors/b' AS BLOB)",
	                                      "route = 'a/#'",
	                                      "received_at = received_at + 1",
	                                      "qos = 0",
	                                      "flags = 1",
	                                      "full_length = full_length + 1",
	                                      "digest = zeroblob(32)",
	                                      "digest = zeroblob(31)",
	                                      "id = zeroblob(12)",
	                                      "id = NULL",
	                                      "topic = NULL",
	                                      "payload = 5",
	                                      "properties = x'00'",
	                                      "checksum = checksum + 1",
	                                      "row = 5000"};
	struct batch back = {0};
	struct spool *spool = open_spool();
	commit_numbers(spool, 1, 1000, 100, 100);
	spool_close(spool);
	size_t count = sizeof changes / sizeof *changes;
	for (size_t i = 0; i < count; i++) {
		char sql[256];
		snprintf(sql, sizeof sql, "UPDATE message SET %s WHERE row = %zu", changes[i], 12 + 26 * i);
		execute(sql);
	}
	spool = open_spool();
	assert_int_equal(status_of(spool).messages, 1000);
	assert_int_equal(read_numbers(spool).count, 1000 - count);
	assert_int_equal(status_of(spool).messages, 1000 - count);
	read_batch(spool, 0, &back, 2000, ALL);
	remove_batch(spool, &back);
	assert_empty(spool);
	spool_close(spool);
	execute("CREATE TEMP TABLE t (n CHECK (n = 16)); INSERT INTO t SELECT count(*) FROM damaged");
	batch_finish(&back);
}

/* More than are set aside in one go, and nothing else. */
static void only_damaged_rows(void **state)
{
	struct spool *spool = open_spool();
	commit_numbers(spool, 1, 500, 100, 100);
	spool_close(spool);
	execute("UPDATE message SET qos = 0 WHERE row <= 300");
	spool = open_spool();
	struct batch back = {0};
	read_batch(spool, 0, &back, 10, ALL);
	assert_int_equal(back.count, 10);
	assert_int_equal(number_of(&back, 0), 301);
	assert_int_equal(status_of(spool).messages, 200);
	spool_close(spool);
	execute("UPDATE message SET qos = 0");
	spool = open_spool();
	assert_empty(spool);
	spool_close(spool);
	batch_finish(&back);
}

/* Somebody writes into the file under the service's hands. By another process: closing the file here would drop
 * SQLite's locks. */
static void damage_in_use(void **state)
{
	struct spool *spool = open_spool();
	struct batch back = {0};
	commit_numbers(spool, 1, 50000, 500, 200); /* more than is kept in memory */
	spool_close(spool);
	spool = open_spool();
	pid_t child = start_child();
	if (child == 0) {
		static const uint8_t zeros[8 * 4096];
		put_bytes(path, (size_t)40 * 4096, zeros, sizeof zeros);
		_exit(0);
	}
	assert_int_equal(child_status(child), 0);
	enum spool_result result = SPOOL_OK;
	int64_t rows[2] = {0};
	for (int64_t after = 0; result == SPOOL_OK;) {
		batch_reset(&back);
		result = spool_read(spool, after, &back, 100, ALL, error, sizeof error);
		if (result != SPOOL_OK)
			break;
		assert_true(back.count > 0);
		if (after == 0)
			memcpy(rows, (int64_t[]){back.messages[0].row, number_of(&back, 0)}, sizeof rows);
		after = back.messages[back.count - 1].row;
	}
	assert_int_equal(result, SPOOL_FAILED);
	assert_int_equal(back.count, 0);
	assert_int_equal(spool_read(spool, 0, &back, 1, 1, error, sizeof error), SPOOL_FAILED);
	expect(spool_test(spool, error, sizeof error));
	struct numbers numbers = read_numbers(spool);
	assert_in_range(numbers.count, 49700, 49999);
	assert_int_equal(numbers.first, 1);
	assert_int_equal(numbers.last, 50000);
	/* The rows have kept their numbers: what was read before can be removed now. */
	read_batch(spool, 0, &back, 1, ALL);
	assert_int_equal(back.messages[0].row, rows[0]);
	assert_int_equal(number_of(&back, 0), rows[1]);
	assert_int_equal(count_files("spool.db.corrupt-20"), 1);
	spool_close(spool);
	batch_finish(&back);
}

/* The steps of a recovery that a crash came between. */
static void a_recovery_that_was_cut_short(void **state)
{
	make_crashed(1000);
	for (int step = 0; step < 5; step++) {
		restore_crashed();
		struct spool *spool = open_spool();
		assert_int_equal(read_numbers(spool).count, 1000);
		spool_close(spool); /* the WAL is in the file now */
		copy_file(path, with(step == 0 ? ".recovering" : ".recovered"));
		copy_file(with(".good"), path);
		copy_file(with("-wal.good"), with("-wal"));
		if (step >= 1)
			put_bytes(path, 0, "damaged", 7);
		if (step >= 2)
			unlink(path);
		if (step >= 3)
			unlink(with("-wal"));
		if (step == 0)
			put_bytes(with(".recovering"), 0, "unfinished", 10);
		assert_int_equal(open_damaged(), 1000);
		assert_int_equal(count_files("spool.db.recovered"), 0);
	}
}

/* A recovery that finds no room is tried again. */
static void a_recovery_without_room(void **state)
{
	make_crashed(1000);
	restore_crashed();
	put_bytes(path, 0, "damaged", 7);
	fail_writes(ENOSPC);
	struct spool *spool = open_spool();
	assert_int_equal(spool_test(spool, error, sizeof error), SPOOL_FULL);
	fail_writes(0);
	sync_errno = EIO;
	assert_int_equal(spool_test(spool, error, sizeof error), SPOOL_FAILED);
	sync_errno = 0;
	expect(spool_test(spool, error, sizeof error));
	assert_numbers(spool, 1, 1000);
	spool_close(spool);
}

/* ---- somebody looks ---- */

/* The exit status of --spool-status, run in a child; its standard output in `text`. */
static int look(char *text, size_t size)
{
	int ends[2];
	assert_int_equal(pipe(ends), 0);
	pid_t child = start_child();
	if (child == 0) {
		struct config_spool config = config_of(10 * MIB);
		dup2(ends[1], STDOUT_FILENO);
		close(ends[0]);
		int code = spool_print_status(&config, true);
		fflush(stdout);
		_exit(code);
	}
	close(ends[1]);
	ssize_t got = 0, part;
	while ((part = read(ends[0], text + got, size - 1 - (size_t)got)) > 0)
		got += part;
	text[got] = 0;
	close(ends[0]);
	return child_status(child);
}

static void assert_looks(const char *expected)
{
	char text[1024];
	assert_int_equal(look(text, sizeof text), 0);
	if (strstr(text, expected) == NULL)
		fail_msg("%s", text);
}

static void somebody_looks(void **state)
{
	assert_looks("\"messages\":0");
	assert_int_equal(count_files("spool"), 0);
	struct spool *spool = open_spool();
	assert_looks("\"messages\":0");
	commit_numbers(spool, 1, 10, 10, 10);
	assert_looks("\"messages\":10");
	commit_numbers(spool, 11, 20000, 1000, 10);
	assert_looks("\"messages\":20000");
	spool_close(spool);
	assert_looks("\"messages\":20000");
	assert_looks("\"oldest\":\"2023-11-14T22:13:20.000Z\"");
	spool = open_spool();
	commit_numbers(spool, 20001, 20010, 10, 10);
	assert_numbers(spool, 1, 20010);
	spool_close(spool);
	unlink(path);
	make_crashed(200);
	restore_crashed();
	assert_looks("\"messages\":200");
	assert_int_equal(open_damaged(), 200);
}

/* A transaction of somebody who reads keeps the WAL from being emptied: the limit holds all the same. */
static void a_reader_that_stays(void **state)
{
	struct batch batch = {0};
	int ends[2];
	char byte = 0;
	struct spool *spool = open_sized(4 * MIB);
	commit_numbers(spool, 1, 100, 100, 100);
	assert_int_equal(pipe(ends), 0);
	pid_t child = start_child();
	if (child == 0) {
		sqlite3 *database;
		if (sqlite3_open_v2(path, &database, SQLITE_OPEN_READONLY, NULL) != SQLITE_OK ||
		    sqlite3_exec(database, "BEGIN; SELECT count(*) FROM message", NULL, NULL, NULL) != SQLITE_OK ||
		    write(ends[1], &byte, 1) != 1)
			_exit(1);
		pause();
	}
	assert_int_equal(read(ends[0], &byte, 1), 1);
	int64_t number = 100;
	enum spool_result result = SPOOL_OK;
	while (result == SPOOL_OK) {
		batch_reset(&batch);
		for (int i = 0; i < 100; i++)
			add_number(&batch, ++number, 200);
		result = commit(spool, &batch);
	}
	assert_int_equal(result, SPOOL_FULL);
	assert_true(most_bytes_seen <= 4 * MIB);
	kill(child, SIGKILL);
	child_status(child);
	expect(commit(spool, &batch));
	assert_numbers(spool, 1, number);
	assert_true(most_bytes_seen <= 4 * MIB);
	spool_close(spool);
	close(ends[0]);
	close(ends[1]);
	batch_finish(&batch);
}

/* ---- files that are moved under the service ---- */

enum way {
	ALL_DELETED,
	ALL_RENAMED,
	FILE_DELETED,
	FILE_RENAMED,
	REPLACED,
	REPLACED_BY_A_LINK,
	WAL_DELETED,
	INDEX_DELETED,
	DIRECTORY_RENAMED,
	DIRECTORY_DELETED,
	WAYS
};

static void delete_all(void)
{
	for (size_t i = 0; i < 4; i++)
		assert_int_equal(unlink(with(suffixes[i])), 0);
}

static void rename_all(void)
{
	for (size_t i = 0; i < 4; i++) {
		char name[192];
		snprintf(name, sizeof name, "%s/moved%s", directory, suffixes[i]);
		assert_int_equal(rename(with(suffixes[i]), name), 0);
	}
}

static const char *inside(const char *name)
{
	static char names[2][128];
	static size_t next;
	char *whole = names[next++ % 2];
	snprintf(whole, sizeof names[0], "%s/%s", directory, name);
	return whole;
}

static void move_files(enum way way)
{
	switch (way) {
	case ALL_DELETED:
		delete_all();
		break;
	case ALL_RENAMED:
		rename_all();
		break;
	case FILE_DELETED:
		assert_int_equal(unlink(path), 0);
		break;
	case FILE_RENAMED:
		assert_int_equal(rename(path, inside("moved")), 0);
		break;
	case REPLACED:
		put_bytes(inside("other"), 0, "somebody else's", 15);
		assert_int_equal(rename(inside("other"), path), 0);
		break;
	case REPLACED_BY_A_LINK:
		assert_int_equal(rename(path, inside("moved")), 0);
		assert_int_equal(symlink(inside("moved"), path), 0);
		break;
	case WAL_DELETED:
		assert_int_equal(unlink(with("-wal")), 0);
		break;
	case INDEX_DELETED:
		assert_int_equal(unlink(with("-shm")), 0);
		break;
	case DIRECTORY_RENAMED:
		assert_int_equal(rename(inside("sub"), inside("moved")), 0);
		break;
	case DIRECTORY_DELETED:
		delete_all();
		assert_int_equal(rmdir(inside("sub")), 0);
		break;
	case WAYS:
		break;
	}
}

/* In a directory of its own, which may go. */
static void use_directory(void)
{
	assert_int_equal(mkdir(inside("sub"), 0700), 0);
	snprintf(path, sizeof path, "%s/sub/spool.db", directory);
}

/* Messages 11 to 50, with 1 to 10 removed. */
static struct spool *open_with_some(void)
{
	struct batch batch = {0};
	struct spool *spool = open_spool();
	commit_numbers(spool, 1, 50, 10, 100);
	read_batch(spool, 0, &batch, 10, ALL);
	remove_batch(spool, &batch);
	batch_finish(&batch);
	return spool;
}

/* What a kill -9 leaves is what was acknowledged, whatever happened to the files. */
static void a_moved_file(void **state)
{
	for (enum way way = 0; way < WAYS; way++) {
		pid_t child = start_child();
		if (child == 0) {
			use_directory();
			struct spool *spool = open_with_some();
			move_files(way);
			commit_numbers(spool, 51, 100, 25, 100);
			assert_numbers(spool, 11, 100);
			_exit(0);
		}
		assert_int_equal(child_status(child), 0);
		snprintf(path, sizeof path, "%s/sub/spool.db", directory);
		struct spool *spool = open_spool();
		if (status_of(spool).messages != 90)
			fail_msg("way %d: %llu messages, not 90", (int)way,
			         (unsigned long long)status_of(spool).messages);
		assert_numbers(spool, 11, 100);
		spool_close(spool);
		remove_directory(NULL);
		assert_int_equal(mkdir(directory, 0700), 0);
	}
}

/* What the commit has written is not believed, and neither is it there twice. */
static void moved_during_the_commit(void **state)
{
	pid_t child = start_child();
	if (child == 0) {
		struct spool *spool = open_with_some();
		sync_hook = delete_all;
		commit_numbers(spool, 51, 100, 50, 100);
		assert_null(sync_hook);
		assert_numbers(spool, 11, 100);
		sync_hook = rename_all;
		expect(spool_test(spool, error, sizeof error));
		assert_null(sync_hook);
		_exit(0);
	}
	assert_int_equal(child_status(child), 0);
	struct spool *spool = open_spool();
	assert_numbers(spool, 11, 100);
	spool_close(spool);
}

static void moved_while_it_drains(void **state)
{
	pid_t child = start_child();
	if (child == 0) {
		struct batch batch = {0};
		struct spool *spool = open_with_some();
		delete_all();
		read_batch(spool, 0, &batch, 20, ALL);
		assert_int_equal(number_of(&batch, 0), 11);
		remove_batch(spool, &batch);
		_exit(0);
	}
	assert_int_equal(child_status(child), 0);
	struct spool *spool = open_spool();
	assert_numbers(spool, 31, 50);
	spool_close(spool);
}

static void moved_and_closed(void **state)
{
	struct spool *spool = open_with_some();
	delete_all();
	spool_close(spool);
	spool = open_spool();
	assert_numbers(spool, 11, 50);
	assert_takes(spool);
	spool_close(spool);
}

/* Every column of every message, and those that are kept as damaged. */
static void a_moved_file_comes_back_whole(void **state)
{
	struct batch batch = {0}, before = {0}, back = {0};
	struct spool *spool = open_spool();
	add_all_kinds(&batch);
	expect(commit(spool, &batch));
	execute("UPDATE message SET payload = 'another' WHERE row = 2");
	read_batch(spool, 0, &before, 1000, ALL);
	assert_int_equal(before.count, batch.count - 1);
	delete_all();
	expect(spool_test(spool, error, sizeof error));
	read_batch(spool, 0, &back, 1000, ALL);
	assert_int_equal(back.count, before.count);
	for (size_t i = 0; i < back.count; i++) {
		assert_same(&before, i, &back, i);
		assert_int_equal(back.messages[i].row, before.messages[i].row);
	}
	spool_close(spool);
	execute("CREATE TEMP TABLE one (damaged CHECK (damaged = 1)); INSERT INTO one SELECT count(*) FROM damaged "
	        "WHERE row = 2 AND payload = 'another'");
	batch_finish(&batch);
	batch_finish(&before);
	batch_finish(&back);
}

/* Until it can be made anew nothing is taken; what is in it can be stored elsewhere and removed. */
static void moved_and_its_place_taken(void **state)
{
	struct batch batch = {0};
	use_directory();
	struct spool *spool = open_with_some();
	assert_int_equal(rename(inside("sub"), inside("moved")), 0);
	put_bytes(inside("sub"), 0, "a file", 6);
	add_number(&batch, 51, 100);
	for (int i = 0; i < 2; i++) {
		assert_int_equal(commit(spool, &batch), SPOOL_FAILED);
		assert_non_null(strstr(error, path));
		assert_non_null(strstr(error, "moved"));
		assert_int_equal(spool_test(spool, error, sizeof error), SPOOL_FAILED);
	}
	assert_numbers(spool, 11, 50);
	read_batch(spool, 0, &batch, 10, ALL);
	remove_batch(spool, &batch);
	assert_int_equal(unlink(inside("sub")), 0);
	expect(spool_test(spool, error, sizeof error));
	commit_numbers(spool, 51, 60, 5, 100);
	assert_numbers(spool, 21, 60);
	spool_close(spool);
	batch_finish(&batch);
}

static void moved_on_a_full_disk(void **state)
{
	struct batch batch = {0};
	struct spool *spool = open_with_some();
	add_number(&batch, 51, 100);
	delete_all();
	fail_writes(ENOSPC);
	assert_int_equal(commit(spool, &batch), SPOOL_FULL);
	assert_int_equal(count_files("spool.db.recover"), 0);
	fail_writes(0);
	expect(commit(spool, &batch));
	assert_numbers(spool, 11, 51);
	spool_close(spool);
	batch_finish(&batch);
}

static void moved_and_an_error(void **state)
{
	struct batch batch = {0};
	struct spool *spool = open_with_some();
	add_number(&batch, 51, 100);
	sync_hook = delete_all;
	sync_errno = EIO;
	assert_int_equal(commit(spool, &batch), SPOOL_FAILED);
	assert_int_equal(spool_test(spool, error, sizeof error), SPOOL_FAILED);
	sync_errno = 0;
	expect(spool_test(spool, error, sizeof error));
	expect(commit(spool, &batch));
	assert_numbers(spool, 11, 51);
	spool_close(spool);
	batch_finish(&batch);
}

/* With its lock deleted, another may have taken the place. */
static void moved_and_another_came(void **state)
{
	int ends[2];
	char byte;
	struct batch batch = {0};
	struct spool *spool = open_with_some();
	add_number(&batch, 51, 100);
	delete_all();
	assert_int_equal(pipe(ends), 0);
	pid_t child = start_child();
	if (child == 0) {
		commit_numbers(open_spool(), 1, 1, 1, 1);
		_exit(write(ends[1], "x", 1) == 1 && pause());
	}
	assert_int_equal(read(ends[0], &byte, 1), 1);
	assert_int_equal(commit(spool, &batch), SPOOL_FAILED);
	char holder[64];
	snprintf(holder, sizeof holder, "process %ld", (long)child);
	assert_non_null(strstr(error, holder));
	assert_int_equal(count_files("spool.db.replaced"), 0);
	kill(child, SIGKILL);
	child_status(child);
	expect(spool_test(spool, error, sizeof error));
	expect(commit(spool, &batch));
	assert_numbers(spool, 11, 51);
	assert_int_equal(count_files("spool.db.replaced"), 2); /* with its log */
	spool_close(spool);
	close(ends[0]);
	close(ends[1]);
	batch_finish(&batch);
}

static void only_the_lock_is_deleted(void **state)
{
	struct config_spool config = config_of(10 * MIB);
	struct spool *spool = open_with_some();
	assert_int_equal(unlink(with(".lock")), 0);
	commit_numbers(spool, 51, 60, 10, 100);
	assert_null(spool_open(&config, error, sizeof error));
	assert_int_equal(count_files("spool.db.replaced"), 0);
	assert_numbers(spool, 11, 60);
	spool_close(spool);
}

/* ---- what others could put in its place ---- */

static void links_are_not_followed(void **state)
{
	static const char content[] = "somebody else's";
	for (size_t i = 0; i < 4; i++) {
		size_t length;
		put_bytes(inside("victim"), 0, content, sizeof content);
		assert_int_equal(symlink(inside("victim"), with(suffixes[i])), 0);
		struct spool *spool = open_spool();
		if (i != 1) /* SQLite deletes a log without a file */
			assert_unusable(spool, i == 0 ? "symbolic link" : "");
		uint8_t *kept = content_of(inside("victim"), &length);
		assert_int_equal(length, sizeof content);
		assert_memory_equal(kept, content, length);
		free(kept);
		assert_true(unlink(with(suffixes[i])) == 0 || i == 1);
		assert_usable(spool);
		spool_close(spool);
		for (size_t j = 0; j < 4; j++)
			unlink(with(suffixes[j]));
	}
}

/* As systemd's DynamicUser has it; later the link leads to another directory, on a larger disk. */
static void a_link_to_the_directory(void **state)
{
	assert_int_equal(mkdir(inside("one"), 0700), 0);
	assert_int_equal(symlink("one", inside("sub")), 0);
	snprintf(path, sizeof path, "%s/sub/spool.db", directory);
	struct spool *spool = open_with_some();
	assert_int_equal(rename(inside("one"), inside("two")), 0);
	assert_int_equal(unlink(inside("sub")), 0);
	assert_int_equal(symlink("two", inside("sub")), 0);
	commit_numbers(spool, 51, 60, 10, 100);
	assert_numbers(spool, 11, 60);
	assert_int_equal(access(inside("two/spool.db"), F_OK), 0);
	spool_close(spool);
	spool = open_spool();
	assert_numbers(spool, 11, 60);
	spool_close(spool);
}

static void a_directory_of_somebody_else(void **state)
{
	struct config_spool config = config_of(10 * MIB);
	if (geteuid() != 0)
		return;
	for (int i = 0; i < 2; i++) {
		assert_int_equal(chown(directory, i == 0 ? NOBODY : 0, NOBODY), 0);
		assert_int_equal(chmod(directory, i == 0 ? 0700 : 0777), 0);
		assert_null(spool_open(&config, error, sizeof error));
		assert_non_null(strstr(error, path));
		assert_non_null(strstr(error, i == 0 ? "as that user" : "chmod go-w"));
		assert_non_null(strstr(error, "spool.path"));
		assert_int_equal(count_files("spool"), 0);
	}
	pid_t child = start_child();
	if (child == 0) {
		if (setresgid(NOBODY, NOBODY, NOBODY) != 0 || setresuid(NOBODY, NOBODY, NOBODY) != 0)
			_exit(1);
		assert_usable(open_spool());
		_exit(0);
	}
	assert_int_equal(child_status(child), 0);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_directory, remove_directory)

int main(void)
{
	const struct CMUnitTest tests[] = {
	    TEST(every_byte_comes_back),
	    TEST(several_batches_at_once),
	    TEST(a_batch_of_one_route),
	    TEST(reading_stops_at_its_limits),
	    TEST(only_what_is_settled_is_removed),
	    TEST(rows_are_not_used_twice),
	    TEST(the_status),
	    TEST(the_file_is_private),
	    TEST(one_service_for_a_spool),
	    TEST(an_empty_file),
	    TEST(a_foreign_file),
	    TEST(a_foreign_database),
	    TEST(a_foreign_database_with_our_table),
	    TEST(a_newer_format),
	    TEST(a_page_size_of_somebody_else),
	    TEST(a_directory_in_its_place),
	    TEST(a_directory_that_comes_later),
	    TEST(no_permission),
	    TEST(an_fsync_that_fails),
	    TEST(an_fsync_that_fails_while_closing),
	    TEST(a_full_disk),
	    TEST(a_file_system_that_is_full),
	    TEST(full_and_empty_again),
	    TEST(a_lower_limit),
	    TEST(more_than_ever_fits),
	    TEST(never_above_the_limit),
	    TEST(killed_at_any_moment),
	    TEST(a_crash_loses_nothing),
	    TEST(truncated_anywhere),
	    TEST(a_truncated_wal),
	    TEST(without_its_file),
	    TEST(flipped_bits),
	    TEST(every_bit_of_the_header),
	    TEST(a_row_that_was_changed),
	    TEST(only_damaged_rows),
	    TEST(damage_in_use),
	    TEST(a_recovery_that_was_cut_short),
	    TEST(a_recovery_without_room),
	    TEST(somebody_looks),
	    TEST(a_moved_file),
	    TEST(moved_during_the_commit),
	    TEST(moved_while_it_drains),
	    TEST(moved_and_closed),
	    TEST(a_moved_file_comes_back_whole),
	    TEST(moved_and_its_place_taken),
	    TEST(moved_on_a_full_disk),
	    TEST(moved_and_an_error),
	    TEST(moved_and_another_came),
	    TEST(only_the_lock_is_deleted),
	    TEST(links_are_not_followed),
	    TEST(a_link_to_the_directory),
	    TEST(a_directory_of_somebody_else),
	    TEST(a_reader_that_stays),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
