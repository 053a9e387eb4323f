/*
 * directory.c: as root only a directory that nobody else can change or lead elsewhere; as anybody else any; and no file
 * of ours is reached through a symbolic link. What needs root is not tried without.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "directory.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { NOBODY = 65534 };

static char directory[64], error[512];

static int make_directory(void **state)
{
	snprintf(directory, sizeof directory, "/tmp/test_directory-XXXXXX");
	return mkdtemp(directory) == NULL;
}

static int remove_entry(const char *name, const struct stat *status, int flag, struct FTW *place)
{
	return remove(name);
}

static int remove_directory(void **state)
{
	nftw(directory, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
	return 0;
}

static const char *in(const char *name)
{
	static char names[4][128];
	static size_t next;
	char *whole = names[next++ % 4];
	snprintf(whole, sizeof names[0], "%s/%s", directory, name);
	return whole;
}

static void make(const char *name, mode_t mode, uid_t user, gid_t group)
{
	assert_int_equal(mkdir(in(name), 0700), 0);
	assert_int_equal(chown(in(name), user, group), 0);
	assert_int_equal(chmod(in(name), mode), 0);
}

static void assert_settles(const char *path, const char *as)
{
	bool refused;
	char *settled = directory_settle(path, false, &refused, error, sizeof error);
	if (settled == NULL)
		fail_msg("%s: %s", path, error);
	assert_string_equal(settled, as);
	assert_false(refused);
	free(settled);
}

static void assert_refused(const char *path, const char *culprit, const char *remedy)
{
	bool refused = false;
	error[0] = 0;
	assert_null(directory_settle(path, true, &refused, error, sizeof error));
	assert_true(refused);
	if (strstr(error, culprit) == NULL || strstr(error, remedy) == NULL)
		fail_msg("%s", error);
}

static bool is_root(void)
{
	if (geteuid() != 0)
		print_message("not root: not tried\n");
	return geteuid() == 0;
}

static void what_root_decides(void **state)
{
	if (!is_root())
		return;
	make("private", 0700, 0, 0);
	make("readable", 0755, 0, NOBODY);
	make("root's group", 02775, 0, 0);
	assert_settles(in("private"), in("private"));
	assert_settles(in("readable"), in("readable"));
	assert_settles(in("root's group"), in("root's group"));
	assert_settles(in("private/"), in("private"));
	assert_settles(in("private/../readable"), in("readable"));
	assert_int_equal(chdir(in("private")), 0);
	assert_settles(".", in("private"));
	assert_int_equal(chdir("/"), 0);
}

static void what_others_decide(void **state)
{
	if (!is_root())
		return;
	make("theirs", 0700, NOBODY, NOBODY);
	make("group", 0770, 0, NOBODY);
	make("all", 0777, 0, 0);
	make("sticky", 01777, 0, 0);
	assert_refused(in("theirs"), in("theirs"), "as that user");
	assert_refused(in("theirs/"), in("theirs"), "as that user");
	assert_refused(in("group"), in("group"), "chmod go-w");
	assert_refused(in("all"), in("all"), "chmod go-w");
	assert_refused(in("sticky"), in("sticky"), "chmod go-w");
}

/* Who may write to a directory can put another in the place of one below it. */
static void what_others_decide_above(void **state)
{
	if (!is_root())
		return;
	make("theirs", 0755, NOBODY, NOBODY);
	make("theirs/state", 0700, 0, 0);
	make("all", 0777, 0, 0);
	make("sticky", 01777, 0, 0);
	make("sticky/ours", 0700, 0, 0);
	assert_refused(in("theirs/state"), in("theirs"), "as that user");
	assert_refused(in("theirs/new/er"), in("theirs"), "as that user");
	assert_refused(in("all/new"), in("all"), "chmod go-w");
	assert_int_equal(access(in("theirs/new"), F_OK), -1);
	assert_int_equal(access(in("all/new"), F_OK), -1);
	assert_settles(in("sticky/ours"), in("sticky/ours"));
}

static void links(void **state)
{
	make("private", 0700, 0, 0);
	make("private/state", 0700, 0, 0);
	assert_int_equal(symlink("private/state", in("link")), 0); /* systemd's DynamicUser */
	assert_settles(in("link"), in("private/state"));
	if (!is_root())
		return;
	make("theirs", 0755, NOBODY, NOBODY);
	make("theirs/state", 0700, 0, 0);
	make("sticky", 01777, 0, 0);
	assert_int_equal(symlink("theirs/state", in("into theirs")), 0);
	assert_int_equal(symlink(in("private/state"), in("theirs/link")), 0);
	assert_int_equal(symlink(in("private/state"), in("sticky/link")), 0);
	assert_settles(in("sticky/link"), in("private/state"));
	assert_int_equal(lchown(in("sticky/link"), NOBODY, NOBODY), 0);
	assert_refused(in("into theirs"), in("theirs"), "as that user");
	assert_refused(in("theirs/link"), in("theirs"), "as that user");
	assert_refused(in("sticky/link"), in("sticky/link"), "as that user");
}

/* Kubernetes gives a volume to a group, or to everybody. */
static void an_ordinary_user_is_refused_nothing(void **state)
{
	if (!is_root())
		return;
	make("volume", 02777, 0, NOBODY);
	make("group", 0770, 0, NOBODY);
	assert_int_equal(chmod(directory, 0755), 0);
	fflush(NULL);
	pid_t child = fork();
	if (child == 0) {
		bool refused = false;
		if (setresgid(NOBODY, NOBODY, NOBODY) != 0 || setresuid(NOBODY, NOBODY, NOBODY) != 0)
			_exit(1);
		if (directory_settle(in("volume"), true, &refused, error, sizeof error) == NULL || refused)
			_exit(2);
		if (directory_settle(in("volume/new"), true, &refused, error, sizeof error) == NULL || refused)
			_exit(3);
		_exit(directory_settle(in("group"), true, &refused, error, sizeof error) == NULL ? 4 : 0);
	}
	int status;
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_int_equal(status, 0);
}

static void it_is_made(void **state)
{
	struct stat status;
	bool refused = true;
	char *settled = directory_settle(in("a/b/c"), true, &refused, error, sizeof error);
	assert_non_null(settled);
	assert_string_equal(settled, in("a/b/c"));
	assert_int_equal(stat(settled, &status), 0);
	assert_int_equal(status.st_mode & 07777, 0700);
	free(settled);
	assert_null(directory_settle(in("d"), false, &refused, error, sizeof error));
	assert_false(refused);
	assert_non_null(strstr(error, strerror(ENOENT)));
	close(open(in("file"), O_CREAT | O_WRONLY, 0600));
	assert_null(directory_settle(in("file"), true, &refused, error, sizeof error));
	assert_false(refused);
	assert_non_null(strstr(error, strerror(ENOTDIR)));
	assert_null(directory_settle(in("file/below"), true, &refused, error, sizeof error));
}

static void only_regular_files(void **state)
{
	struct stat status;
	int at = directory_open(directory);
	assert_true(at >= 0);
	mode_t mask = umask(0);
	int fd = directory_open_file(at, "new", O_RDWR | O_CREAT | O_EXCL);
	umask(mask);
	assert_true(fd >= 0);
	assert_int_equal(fstat(fd, &status), 0);
	assert_int_equal(status.st_mode & 07777, 0600);
	assert_int_equal(fcntl(fd, F_GETFD), FD_CLOEXEC);
	close(fd);
	assert_int_equal(symlink("new", in("link")), 0);
	assert_int_equal(symlink("nothing", in("dangling")), 0);
	assert_int_equal(mkfifo(in("fifo"), 0600), 0);
	assert_int_equal(mkdir(in("directory"), 0700), 0);
	assert_int_equal(directory_open_file(at, "link", O_RDWR | O_CREAT), -1);
	assert_int_equal(errno, ELOOP);
	assert_int_equal(directory_open_file(at, "dangling", O_RDWR | O_CREAT), -1);
	assert_int_equal(errno, ELOOP);
	assert_int_equal(access(in("nothing"), F_OK), -1);
	assert_int_equal(directory_open_file(at, "fifo", O_RDONLY), -1);
	assert_int_equal(errno, EINVAL);
	assert_int_equal(directory_open_file(at, "directory", O_RDONLY), -1);
	assert_int_equal(errno, EISDIR);
	close(at);
	assert_int_equal(symlink(directory, in("itself")), 0);
	assert_int_equal(directory_open(in("itself")), -1);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_directory, remove_directory)

int main(void)
{
	const struct CMUnitTest tests[] = {
	    TEST(what_root_decides),
	    TEST(what_others_decide),
	    TEST(what_others_decide_above),
	    TEST(links),
	    TEST(an_ordinary_user_is_refused_nothing),
	    TEST(it_is_made),
	    TEST(only_regular_files),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
