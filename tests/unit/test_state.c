/*
 * state.c: one process a role, a client id made once, filters remembered, a file that is replaced whole and durably,
 * and what is said when the directory cannot be used or the file is damaged.
 *
 * fsync() and renameat() are this program's own: they write down what is called on what, do it, or fail when told to.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "state.h"

#include <cjson/cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define SESSION "mqtt2mongo-test-1"

static char directory[64], error[512];

/* ---- the calls that make a file durable ---- */

static char calls[1024];
static int fail_call; /* the how manieth fails, with EIO; 0: none */
static int call_count;

static bool note_call(const char *what, const char *path)
{
	const char *name = strrchr(path, '/') != NULL ? strrchr(path, '/') + 1 : path;
	size_t used = strlen(calls);
	snprintf(calls + used, sizeof calls - used, "%s %s; ", what, name);
	if (++call_count != fail_call)
		return true;
	errno = EIO;
	return false;
}

int fsync(int fd)
{
	char link[32], path[256] = "";
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	if (readlink(link, path, sizeof path - 1) < 0)
		path[0] = 0;
	return note_call("fsync", path) ? (int)syscall(SYS_fsync, fd) : -1;
}

// NOLINTNEXTLINE(readability-inconsistent-declaration-parameter-name)
int renameat(int old_directory, const char *old, int new_directory, const char *new)
{
	return note_call("rename to", new) ? (int)syscall(SYS_renameat2, old_directory, old, new_directory, new, 0u)
	                                   : -1;
}

/* ---- a directory of its own for each test ---- */

static int make_directory(void **state)
{
	snprintf(directory, sizeof directory, "/tmp/test_state-XXXXXX");
	calls[0] = error[0] = 0;
	fail_call = call_count = 0;
	return mkdtemp(directory) == NULL;
}

static int remove_entry(const char *path, const struct stat *status, int flag, struct FTW *place)
{
	return remove(path);
}

static int remove_directory(void **state)
{
	nftw(directory, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
	return 0;
}

static const char *in_directory(const char *name)
{
	static char path[128];
	snprintf(path, sizeof path, "%s/%s", directory, name);
	return path;
}

static void put_file(const char *text)
{
	FILE *file = fopen(in_directory("state.json"), "w");
	assert_non_null(file);
	fputs(text, file);
	fclose(file);
}

static void assert_file(const char *name, const char *expected)
{
	char text[8192] = "";
	FILE *file = fopen(in_directory(name), "r");
	if (file == NULL)
		fail_msg("no file %s", name);
	text[fread(text, 1, sizeof text - 1, file)] = 0;
	fclose(file);
	assert_string_equal(text, expected);
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

static struct state *open_state(void)
{
	struct state *state = state_open(directory, error, sizeof error);
	if (state == NULL)
		fail_msg("%s", error);
	return state;
}

static void save(struct state *state)
{
	if (!state_save(state, error, sizeof error))
		fail_msg("%s", error);
}

static void assert_filters(const struct state *state, const char *session, const char *const *expected)
{
	size_t i = 0;
	for (; expected[i] != NULL; i++) {
		const char *filter = state_filter(state, session, i);
		assert_non_null(filter);
		assert_string_equal(filter, expected[i]);
	}
	assert_null(state_filter(state, session, i));
	assert_null(state_filter(state, session, i + 1));
}
#define FILTERS(...) ((const char *const[]){__VA_ARGS__, NULL})
#define NONE         ((const char *const[]){NULL})

/* ---- the directory ---- */

static void directories_are_made(void **state)
{
	char path[128];
	snprintf(path, sizeof path, "%s/a/b/c", directory);
	struct state *opened = state_open(path, error, sizeof error);
	assert_non_null(opened);
	state_add_filter(opened, SESSION, "a");
	save(opened);
	state_close(opened);
	struct stat status;
	assert_int_equal(stat(path, &status), 0);
	assert_int_equal(status.st_mode & 0777, 0700);
	snprintf(path, sizeof path, "%s/a/b/c/state.json", directory);
	assert_int_equal(stat(path, &status), 0);
	assert_int_equal(status.st_mode & 0777, 0600);
}

static void closing_nothing(void **state)
{
	state_close(NULL);
}

static void assert_unusable(const char *path)
{
	error[0] = 0;
	struct state *opened = state_open(path, error, sizeof error);
	assert_null(opened);
	assert_non_null(strstr(error, path));
	assert_non_null(strstr(error, "state_dir")); /* the remedy */
}

static void a_file_in_the_way(void **state)
{
	char path[128];
	put_file("{}");
	snprintf(path, sizeof path, "%s/state.json", directory);
	assert_unusable(path);
	snprintf(path, sizeof path, "%s/state.json/below", directory);
	assert_unusable(path);
}

/* As nobody, for root may write everywhere: in a child. */
static void an_unwritable_directory(void **state)
{
	chmod(directory, 0555);
	fflush(NULL);
	pid_t child = fork();
	if (child == 0) {
		if (geteuid() == 0 && (setresgid(65534, 65534, 65534) != 0 || setresuid(65534, 65534, 65534) != 0))
			_exit(4);
		struct state *opened = state_open(directory, error, sizeof error);
		if (opened != NULL)
			_exit(1);
		if (strstr(error, directory) == NULL || strstr(error, "Permission denied") == NULL ||
		    strstr(error, "state_dir") == NULL)
			_exit(2);
		char below[128];
		snprintf(below, sizeof below, "%s/below", directory);
		_exit(state_open(below, error, sizeof error) != NULL ? 3 : 0);
	}
	int status;
	waitpid(child, &status, 0);
	chmod(directory, 0755);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
}

/* Whatever of ours is a link to something else: it is said, or put in the link's place, and that is left as it was. */
static void links_are_not_followed(void **state)
{
	static const char *const names[] = {"consumer.lock", "publisher.lock", "state.lock", "state.json",
	                                    "state.json.tmp"};
	static const char content[] = "{\"client_id\": \"somebody else's\"}";
	char victim[128];
	snprintf(victim, sizeof victim, "%s", in_directory("victim"));
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		put_file(content);
		assert_int_equal(syscall(SYS_rename, in_directory("state.json"), victim), 0);
		assert_int_equal(symlink(victim, in_directory(names[i])), 0);
		error[0] = 0;
		struct state *opened = state_open(directory, error, sizeof error);
		bool well = opened != NULL;
		if (well) {
			assert_memory_equal(state_client_id(opened, NULL), "mqtt2mongo-", 11);
			well = state_lock(opened, "consumer", error, sizeof error) &&
			       state_lock(opened, "publisher", error, sizeof error) &&
			       state_save(opened, error, sizeof error);
		}
		state_close(opened);
		assert_file("victim", content);
		if (well != (strcmp(names[i], "state.json.tmp") == 0))
			fail_msg("%s: %s", names[i], error);
		if (!well && strstr(error, directory) == NULL)
			fail_msg("%s", error);
		unlink(in_directory(names[i]));
		unlink(in_directory("state.json"));
	}
}

/* In which somebody who is not root could put such links. */
static void a_directory_of_somebody_else(void **state)
{
	if (geteuid() != 0)
		return;
	assert_int_equal(chown(directory, 65534, 65534), 0);
	assert_unusable(directory);
	assert_non_null(strstr(error, "as that user"));
	assert_int_equal(chown(directory, 0, 0), 0);
	assert_int_equal(chmod(directory, 0777), 0);
	assert_unusable(directory);
	assert_non_null(strstr(error, "chmod go-w"));
	assert_int_equal(count_files("state"), 0);
	fflush(NULL);
	pid_t child = fork();
	if (child == 0) {
		if (setresgid(65534, 65534, 65534) != 0 || setresuid(65534, 65534, 65534) != 0)
			_exit(1);
		struct state *opened = state_open(directory, error, sizeof error);
		_exit(opened != NULL && state_lock(opened, "consumer", error, sizeof error) ? 0 : 2);
	}
	int status;
	waitpid(child, &status, 0);
	assert_int_equal(status, 0);
}

/* ---- the client id ---- */

static void a_client_id_is_made_once(void **state)
{
	struct state *opened = open_state();
	char made[64];
	snprintf(made, sizeof made, "%s", state_client_id(opened, NULL));
	assert_int_equal(strlen(made), strlen("mqtt2mongo-12345678"));
	assert_memory_equal(made, "mqtt2mongo-", 11);
	assert_int_equal(strspn(made + 11, "0123456789abcdef"), 8);
	assert_string_equal(state_client_id(opened, NULL), made);
	save(opened);
	state_close(opened);
	for (int i = 0; i < 3; i++) {
		opened = open_state();
		assert_string_equal(state_client_id(opened, NULL), made);
		state_add_filter(opened, SESSION, "a/#");
		save(opened);
		state_close(opened);
	}
}

static void another_directory_another_client_id(void **state)
{
	char path[128], first[64];
	struct state *opened = open_state();
	snprintf(first, sizeof first, "%s", state_client_id(opened, NULL));
	state_close(opened);
	snprintf(path, sizeof path, "%s/other", directory);
	opened = state_open(path, error, sizeof error);
	assert_non_null(opened);
	assert_string_not_equal(state_client_id(opened, NULL), first);
	state_close(opened);
}

/* Configured, it wins, and does not replace the made one. */
static void a_configured_client_id(void **state)
{
	struct state *opened = open_state();
	char made[64];
	assert_string_equal(state_client_id(opened, "mine"), "mine");
	snprintf(made, sizeof made, "%s", state_client_id(opened, NULL));
	assert_string_not_equal(made, "mine");
	assert_string_equal(state_client_id(opened, "mine"), "mine");
	save(opened);
	state_close(opened);
	opened = open_state();
	assert_string_equal(state_client_id(opened, NULL), made);
	state_close(opened);
}

static void a_useless_client_id_is_replaced(void **state)
{
	static const char *const files[] = {"{\"client_id\": \"\"}", "{\"client_id\": 7}", "{\"client_id\": null}",
	                                    "{\"Client_ID\": \"x\"}"};
	for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
		put_file(files[i]);
		struct state *opened = open_state();
		assert_memory_equal(state_client_id(opened, NULL), "mqtt2mongo-", 11);
		state_close(opened);
	}
}

/* ---- filters ---- */

static void filters_are_remembered(void **state)
{
	struct state *opened = open_state();
	assert_filters(opened, SESSION, NONE);
	state_add_filter(opened, SESSION, "sensors/#");
	state_add_filter(opened, SESSION, "a/+/\"caf\xc3\xa9\"");
	state_add_filter(opened, SESSION, "sensors/#");
	state_add_filter(opened, "other-1", "b");
	save(opened);
	state_close(opened);
	opened = open_state();
	assert_filters(opened, SESSION, FILTERS("sensors/#", "a/+/\"caf\xc3\xa9\""));
	assert_filters(opened, "other-1", FILTERS("b"));
	assert_filters(opened, "unknown", NONE);
	assert_filters(opened, "OTHER-1", NONE);
	state_close(opened);
}

static void filters_are_forgotten(void **state)
{
	struct state *opened = open_state();
	state_add_filter(opened, SESSION, "a");
	state_add_filter(opened, SESSION, "b");
	state_add_filter(opened, SESSION, "c");
	state_remove_filter(opened, SESSION, "b");
	state_remove_filter(opened, SESSION, "B");
	state_remove_filter(opened, "unknown", "a");
	assert_filters(opened, SESSION, FILTERS("a", "c"));
	save(opened);
	state_close(opened);
	opened = open_state();
	assert_filters(opened, SESSION, FILTERS("a", "c"));
	state_remove_filter(opened, SESSION, "a");
	state_remove_filter(opened, SESSION, "c");
	state_remove_filter(opened, SESSION, "c");
	assert_filters(opened, SESSION, NONE);
	state_add_filter(opened, SESSION, "b");
	assert_filters(opened, SESSION, FILTERS("b"));
	state_close(opened);
}

static void not_saved_not_remembered(void **state)
{
	struct state *opened = open_state();
	state_add_filter(opened, SESSION, "a");
	save(opened);
	state_add_filter(opened, SESSION, "b");
	state_close(opened);
	opened = open_state();
	assert_filters(opened, SESSION, FILTERS("a"));
	state_close(opened);
}

/* What a later version may have written stays. */
static void unknown_members_stay(void **state)
{
	put_file("{\"client_id\": \"old\", \"later\": [1, {\"a\": null}], \"sessions\": {\"s\": [\"x\"]}}");
	struct state *opened = open_state();
	state_add_filter(opened, SESSION, "a");
	save(opened);
	state_close(opened);
	char text[1024] = "";
	FILE *file = fopen(in_directory("state.json"), "r");
	text[fread(text, 1, sizeof text - 1, file)] = 0;
	fclose(file);
	cJSON *tree = cJSON_Parse(text);
	assert_non_null(tree);
	char *later = cJSON_PrintUnformatted(cJSON_GetObjectItemCaseSensitive(tree, "later"));
	assert_string_equal(later, "[1,{\"a\":null}]");
	cJSON_free(later);
	cJSON_Delete(tree);
}

/* ---- damage ---- */

static void a_damaged_file_is_set_aside(void **state)
{
	static const char *const files[] = {
	    "", "{\"client_id\": \"old\"", "[]", "\"text\"", "null", "\xff\xfe\x01", "garbage", ""};
	for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
		put_file(files[i]);
		struct state *opened = open_state();
		assert_filters(opened, SESSION, NONE);
		assert_int_equal(count_files("state.json.corrupt-"), 1);
		assert_int_equal(access(in_directory("state.json"), F_OK), -1);
		DIR *entries = opendir(directory);
		for (const struct dirent *entry; (entry = readdir(entries)) != NULL;)
			if (strncmp(entry->d_name, "state.json.corrupt-", 19) == 0) {
				char name[64];
				snprintf(name, sizeof name, "%.63s", entry->d_name);
				assert_file(name, files[i]);
				unlink(in_directory(name));
			}
		closedir(entries);
		state_add_filter(opened, SESSION, "a");
		save(opened);
		state_close(opened);
		opened = open_state();
		assert_filters(opened, SESSION, FILTERS("a"));
		state_close(opened);
	}
}

/* Then nothing may be written either: it may name a session that is full of messages. */
static void a_file_that_cannot_be_read(void **state)
{
	assert_int_equal(mkdir(in_directory("state.json"), 0700), 0);
	assert_null(state_open(directory, error, sizeof error));
	assert_non_null(strstr(error, in_directory("state.json")));
	assert_non_null(strstr(error, "Is a directory"));
	assert_int_equal(count_files("state.json"), 1);
}

/* JSON, but not what we write: taken for what it is worth. */
static void odd_members(void **state)
{
	static const char *const files[] = {"{}",
	                                    "{\"sessions\": 1}",
	                                    "{\"sessions\": [\"a\"]}",
	                                    "{\"sessions\": {\"" SESSION "\": \"a\"}}",
	                                    "{\"sessions\": {\"" SESSION "\": null}}",
	                                    "{\"sessions\": {\"" SESSION "\": []}}"};
	for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
		put_file(files[i]);
		struct state *opened = open_state();
		assert_filters(opened, SESSION, NONE);
		state_remove_filter(opened, SESSION, "a");
		state_add_filter(opened, SESSION, "b");
		assert_filters(opened, SESSION, FILTERS("b"));
		save(opened);
		state_close(opened);
		opened = open_state();
		assert_filters(opened, SESSION, FILTERS("b"));
		assert_int_equal(count_files("state.json.corrupt-"), 0);
		state_close(opened);
	}
}

/* ---- replacing the file ---- */

static void the_file_is_replaced_durably(void **state)
{
	struct state *opened = open_state();
	char expected[256];
	state_add_filter(opened, SESSION, "a");
	save(opened);
	snprintf(expected, sizeof expected, "fsync state.json.tmp; rename to state.json; fsync %s; ",
	         strrchr(directory, '/') + 1);
	assert_string_equal(calls, expected);
	assert_int_equal(count_files("state.json.tmp"), 0);
	state_close(opened);
}

static void a_leftover_is_overwritten(void **state)
{
	FILE *file = fopen(in_directory("state.json.tmp"), "w");
	for (int i = 0; i < 1000; i++)
		fputs("left by a crash ", file);
	fclose(file);
	struct state *opened = open_state();
	state_add_filter(opened, SESSION, "a");
	save(opened);
	state_close(opened);
	opened = open_state();
	assert_filters(opened, SESSION, FILTERS("a"));
	assert_int_equal(count_files("state.json.corrupt-"), 0);
	state_close(opened);
}

/* The nth of the three calls fails: it is said, and what was there can still be read. */
static void a_failing_disk(void **state)
{
	struct state *opened = open_state();
	state_add_filter(opened, SESSION, "a");
	save(opened);
	state_add_filter(opened, SESSION, "b");
	for (int nth = 1; nth <= 3; nth++) {
		call_count = 0;
		fail_call = nth;
		error[0] = 0;
		assert_false(state_save(opened, error, sizeof error));
		assert_non_null(strstr(error, in_directory("state.json")));
		assert_non_null(strstr(error, "Input/output error"));
		fail_call = 0;
		struct state *other = open_state();
		if (nth < 3) /* else it has been replaced already */
			assert_filters(other, SESSION, FILTERS("a"));
		assert_int_equal(count_files("state.json.corrupt-"), 0);
		state_close(other);
	}
	save(opened);
	state_close(opened);
	opened = open_state();
	assert_filters(opened, SESSION, FILTERS("a", "b"));
	state_close(opened);
}

/* A publisher and a consumer started at the same moment on a new directory. */
static void two_processes_make_one_identity(void **state)
{
	struct state *consumer = open_state(), *publisher = open_state();
	char first[64];
	snprintf(first, sizeof first, "%s", state_client_id(consumer, NULL));
	assert_string_not_equal(state_client_id(publisher, NULL), first);
	state_add_filter(consumer, SESSION, "a");
	save(consumer);
	save(publisher);
	assert_string_equal(state_client_id(publisher, NULL), first);
	save(consumer);
	state_close(publisher);
	state_close(consumer);
	struct state *opened = open_state();
	assert_string_equal(state_client_id(opened, NULL), first);
	assert_filters(opened, SESSION, FILTERS("a"));
	state_close(opened);
}

static void each_process_changes_its_own_session(void **state)
{
	struct state *one = open_state(), *other = open_state();
	state_add_filter(one, SESSION, "a");
	state_add_filter(other, "another-1", "b");
	save(one);
	save(other);
	state_add_filter(one, SESSION, "c");
	state_remove_filter(one, SESSION, "a");
	save(one);
	state_close(other);
	state_close(one);
	struct state *opened = open_state();
	assert_filters(opened, SESSION, FILTERS("c"));
	assert_filters(opened, "another-1", FILTERS("b"));
	state_close(opened);
}

static void a_directory_that_is_gone(void **state)
{
	struct state *opened = open_state();
	state_add_filter(opened, SESSION, "a");
	assert_int_equal(rmdir(directory), 0);
	assert_false(state_save(opened, error, sizeof error));
	assert_non_null(strstr(error, "No such file or directory"));
	assert_false(state_lock(opened, "consumer", error, sizeof error));
	assert_non_null(strstr(error, "No such file or directory"));
	state_close(opened);
}

/* ---- locks ---- */

static bool try_lock(const char *role)
{
	struct state *opened = open_state();
	error[0] = 0;
	bool locked = state_lock(opened, role, error, sizeof error);
	state_close(opened);
	return locked;
}

static void one_lock_a_role(void **state)
{
	struct state *opened = open_state();
	assert_true(state_lock(opened, "consumer", error, sizeof error));
	assert_false(try_lock("consumer"));
	char holder[32];
	snprintf(holder, sizeof holder, "process %ld", (long)getpid());
	assert_non_null(strstr(error, holder));
	assert_non_null(strstr(error, "consumer"));
	assert_non_null(strstr(error, directory));
	assert_non_null(strstr(error, "state_dir"));
	assert_true(try_lock("publisher"));
	assert_true(state_lock(opened, "publisher", error, sizeof error));
	assert_false(try_lock("publisher"));
	state_unlock(opened, "consumer");
	assert_true(try_lock("consumer"));
	assert_false(try_lock("publisher"));
	state_unlock(opened, "publisher");
	assert_true(try_lock("publisher"));
	state_close(opened);
}

static void locks_again_and_again(void **state)
{
	struct state *opened = open_state();
	for (int i = 0; i < 2000; i++) {
		const char *role = i % 2 ? "consumer" : "publisher";
		assert_true(state_lock(opened, role, error, sizeof error));
		if (i % 3 == 0) /* the same role twice: refused, and the lock stays */
			assert_false(state_lock(opened, role, error, sizeof error));
		state_unlock(opened, role);
		state_unlock(opened, role);
	}
	state_close(opened);
	assert_true(try_lock("consumer"));
}

static void closing_releases(void **state)
{
	struct state *opened = open_state();
	assert_true(state_lock(opened, "consumer", error, sizeof error));
	assert_true(state_lock(opened, "publisher", error, sizeof error));
	state_close(opened);
	assert_true(try_lock("consumer"));
	assert_true(try_lock("publisher"));
}

/* A process that is killed leaves its lock file, but no lock. */
static void a_killed_process_holds_nothing(void **state)
{
	int ready[2];
	assert_int_equal(pipe(ready), 0);
	fflush(NULL);
	pid_t child = fork();
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		struct state *opened = state_open(directory, error, sizeof error);
		char answer = opened != NULL && state_lock(opened, "consumer", error, sizeof error) ? 'y' : 'n';
		if (write(ready[1], &answer, 1) != 1)
			_exit(1);
		for (;;)
			pause();
	}
	char answer = 0;
	assert_int_equal(read(ready[0], &answer, 1), 1);
	assert_int_equal(answer, 'y');
	assert_false(try_lock("consumer"));
	char holder[32];
	snprintf(holder, sizeof holder, "process %ld)", (long)child);
	assert_non_null(strstr(error, holder));
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	assert_int_equal(access(in_directory("consumer.lock"), F_OK), 0);
	assert_true(try_lock("consumer"));
	close(ready[0]);
	close(ready[1]);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_directory, remove_directory)

int main(void)
{
	const struct CMUnitTest tests[] = {
	    TEST(directories_are_made),
	    TEST(closing_nothing),
	    TEST(a_file_in_the_way),
	    TEST(an_unwritable_directory),
	    TEST(links_are_not_followed),
	    TEST(a_directory_of_somebody_else),
	    TEST(a_client_id_is_made_once),
	    TEST(another_directory_another_client_id),
	    TEST(a_configured_client_id),
	    TEST(a_useless_client_id_is_replaced),
	    TEST(filters_are_remembered),
	    TEST(filters_are_forgotten),
	    TEST(not_saved_not_remembered),
	    TEST(unknown_members_stay),
	    TEST(a_damaged_file_is_set_aside),
	    TEST(a_file_that_cannot_be_read),
	    TEST(odd_members),
	    TEST(the_file_is_replaced_durably),
	    TEST(a_leftover_is_overwritten),
	    TEST(a_failing_disk),
	    TEST(two_processes_make_one_identity),
	    TEST(each_process_changes_its_own_session),
	    TEST(a_directory_that_is_gone),
	    TEST(one_lock_a_role),
	    TEST(locks_again_and_again),
	    TEST(closing_releases),
	    TEST(a_killed_process_holds_nothing),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
