/*
 * See spool.h for the contract and spool_row.h for the other files of the spool.
 *
 * Tables: `message`, a row each; `tally`, one row with the number of messages and the number of the next row, written
 * in the transaction that changes them, so that nothing is counted at the start and no row number is used twice;
 * `damaged`, rows that are not what was written any more, kept for people.
 *
 * The disk. A commit goes to the write-ahead log (WAL) with one fsync. When the WAL is long it is copied into the file
 * (a checkpoint), here and not by SQLite, so that the sum of file, WAL and index can be held below spool.max_size: what
 * a transaction needs at most is reckoned before it begins (struct footprint), in the WAL and later in the file. A
 * reserve is left that removing never needs more than, if need be a few rows at a time. When the spool has become empty
 * the file is made small again.
 *
 * The index of the WAL (-shm) is shared memory, for else the operator could not look beside a running service. SQLite
 * writes every page of it when it makes it, so that on a full disk that fails (SQLITE_IOERR_SHMSIZE) and no later
 * access can raise SIGBUS; it grows by 32 KiB for each 16 MiB of WAL. The file itself is not mapped.
 *
 * Errors. Whatever is not a full disk ends the connection (`database` is NULL); spool_test() makes a new one. SQLite
 * does not believe a transaction whose fsync failed, but its bytes may be in the WAL and, to the next connection, look
 * like committed. So every connection begins with copying the whole WAL into the file, with fsyncs, and cutting it to
 * nothing, before anything is written behind such bytes: then it does not matter whether they are on the disk.
 *
 * Damage. At the start the structure of a file up to CHECKED_BYTES is checked whole (about 0.1 s); of a larger one only
 * the schema and both ends, for the check would keep the service waiting for seconds. Damage that shows later ends the
 * connection like any error, and then the next one finds it. A damaged file is recovered into a new one beside it: rows
 * by SQLite as far as it comes, then rows from its raw pages. The steps, each safe to die in:
 *
 *   PATH.recovering   being filled; worth nothing
 *   PATH.recovered    complete and on disk; while it exists, PATH is the damaged one
 *   PATH, PATH-wal    renamed to PATH.corrupt-TIME, then PATH.recovered renamed to PATH
 *
 * Moved. SQLite goes on in a file that was deleted, renamed or replaced, and nobody will find there what it has. So
 * after each commit, before it is believed, and before the next, it is asked whether the names still lead to the files
 * that are open: the file, its WAL, its index. If not, the transaction is taken back, and every row that the open file
 * has is carried over, as it is, into a new one by the steps above (what is at PATH being renamed to
 * PATH.replaced-TIME, unless it is ours), which must take a commit; then the transaction is made again there. Until
 * that succeeds nothing is taken, but the open file is kept, and what is in it can be read and removed.
 */
#define _GNU_SOURCE
#include "spool.h"

#include "clock.h"
#include "directory.h"
#include "log.h"
#include "memory.h"
#include "spool_row.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

enum {
	BUSY_MS = 200, /* for somebody else who writes or looks */
	CACHE_KIB = 4096,
	WAL_BYTES = 8 * 1024 * 1024, /* copied into the file when it is longer */
	CHECKED_BYTES = 128 * 1024 * 1024,
	SHRUNK_BYTES = 1024 * 1024, /* an empty spool may stay this large */
	SMALLEST_BYTES = 1024 * 1024,
	INDEX_BYTES = 32 * 1024, /* of the WAL's index, for each INDEX_FRAMES */
	INDEX_FRAMES = 4096,
	FRAME_BYTES = (int)SPOOL_WAL_FRAME + (int)SPOOL_PAGE,
	FIXED_FRAMES = 12,          /* pages that any transaction may change: first, tally, root, edges */
	RESERVE_BYTES = 160 * 1024, /* to remove FEW_ROWS with */
	FEW_ROWS = 16,
	DAMAGED_AT_ONCE = 64,
	WAL_READ_MOST = 1024 * 1024 * 1024,
};
#define LARGEST_DEFAULT ((int64_t)1024 * 1024 * 1024)

static const char MESSAGE_TABLE[] = "CREATE TABLE message (" SPOOL_COLUMN_TYPES ")";
static const char DAMAGED_TABLE[] = "CREATE TABLE damaged (" SPOOL_COLUMN_TYPES ")";
static const char TALLY_TABLE[] = "CREATE TABLE tally (messages INTEGER, next_row INTEGER, tests INTEGER)";
static const char *const SCHEMA[] = {MESSAGE_TABLE, DAMAGED_TABLE, TALLY_TABLE};
enum { TABLES = sizeof SCHEMA / sizeof *SCHEMA };

/* The statements a connection keeps prepared. */
enum statement {
	BEGIN,
	COMMIT,
	ROLLBACK,
	INSERT,
	COUNT,
	READ,
	REMOVE,
	SET_ASIDE,
	OLDEST,
	TALLY,
	TEST,
	PAGES,
	FREE_PAGES,
	STATEMENTS
};

static const char INSERT_ROW[] =
    "INSERT INTO message (" SPOOL_COLUMN_NAMES ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
static const char INSERT_ROW_UNLESS_THERE[] =
    "INSERT OR IGNORE INTO message (" SPOOL_COLUMN_NAMES ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
static const char READ_ROWS[] = "SELECT " SPOOL_COLUMN_NAMES " FROM message WHERE row > ? ORDER BY row";

static const char *const SQL[STATEMENTS] = {
    [BEGIN] = "BEGIN IMMEDIATE",
    [COMMIT] = "COMMIT",
    [ROLLBACK] = "ROLLBACK",
    [INSERT] = INSERT_ROW,
    [COUNT] = "UPDATE tally SET messages = ?, next_row = ?",
    [READ] = READ_ROWS,
    [REMOVE] = "DELETE FROM message WHERE row BETWEEN ? AND ?",
    [SET_ASIDE] = "INSERT OR REPLACE INTO damaged SELECT * FROM message WHERE row = ?",
    [OLDEST] = "SELECT received_at FROM message ORDER BY row LIMIT 1",
    [TALLY] = "SELECT messages, next_row FROM tally",
    [TEST] = "UPDATE tally SET tests = tests + 1",
    [PAGES] = "PRAGMA page_count",
    [FREE_PAGES] = "PRAGMA freelist_count",
};

/* Which file it is, whatever its name: as long as somebody has it open, no other can be the same. */
struct identity {
	dev_t device;
	ino_t inode; /* 0: there is none */
};

enum { FILE_ITSELF, FILE_WAL, FILE_INDEX, FILES };

struct spool {
	char *configured;                            /* the path as it was given */
	char *path, *wal, *index, *lock, *directory; /* the same without symbolic links, once `settled` */
	bool settled;
	int lock_fd;
	int64_t configured_size; /* bytes; 0: settled when the spool is opened */
	sqlite3 *database;       /* NULL: failed */
	sqlite3_stmt *statements[STATEMENTS];
	struct identity files[FILES]; /* that the connection has open */
	sqlite3 *moved;       /* a connection to a file that is not in place any more, with rows to carry over */
	struct identity copy; /* the file that has all rows of `moved`, */
	int64_t copied;       /* how many messages, */
	bool unplaced;        /* and that has not got its name: PATH.recovered is there */
	bool stuck;           /* the last carrying over failed */
	bool damaged;         /* the file, by what SQLite said */
	int64_t next_row;
	int64_t wal_frames; /* in use, at most */
	int64_t refused;    /* frames that the transaction needed for which there was no room, or 0 */
	struct log_repeat damaged_rows;
	/* For spool_status(), which may look from another thread. */
	_Atomic uint64_t messages, bytes, max_size;
	_Atomic int64_t oldest_ms;
	_Atomic bool readable;
};

/* ---- what went wrong ---- */

static bool is_damage(int code)
{
	code &= 0xff;
	return code == SQLITE_CORRUPT || code == SQLITE_NOTADB || code == SQLITE_FORMAT;
}

static bool is_no_room(int reason)
{
	return reason == ENOSPC || reason == EDQUOT;
}

/* The errno of the last failure on the file or, `control` being SQLITE_FCNTL_JOURNAL_POINTER, on its WAL. */
static int last_errno(sqlite3 *database, int control)
{
	sqlite3_file *file = NULL;
	int reason = 0;
	if (sqlite3_file_control(database, "main", control, &file) == SQLITE_OK && file != NULL &&
	    file->pMethods != NULL)
		file->pMethods->xFileControl(file, SQLITE_FCNTL_LAST_ERRNO, &reason);
	return reason;
}

/* SQLite knows ENOSPC; for what else means that there is no room, errno may have changed since. */
static bool is_full(sqlite3 *database, int code)
{
	int kind = code & 0xff;
	if (kind == SQLITE_FULL)
		return true;
	if (code == SQLITE_IOERR_FSYNC || code == SQLITE_IOERR_DIR_FSYNC || database == NULL)
		return false; /* whatever the reason is: what is on disk is not known */
	if ((kind == SQLITE_IOERR || kind == SQLITE_CANTOPEN) && is_no_room(sqlite3_system_errno(database)))
		return true;
	return code == SQLITE_IOERR_WRITE && (is_no_room(last_errno(database, SQLITE_FCNTL_FILE_POINTER)) ||
	                                      is_no_room(last_errno(database, SQLITE_FCNTL_JOURNAL_POINTER)));
}

/* SQLite's words for an error, and the system's where there are some. */
static char *describe(sqlite3 *database, int code)
{
	int reason = database != NULL ? sqlite3_system_errno(database) : 0;
	int kind = code & 0xff;
	if (code == SQLITE_CANTOPEN_SYMLINK)
		return memory_string("it is a symbolic link; give the file itself as spool.path");
	bool by_system = reason != 0 && (kind == SQLITE_IOERR || kind == SQLITE_CANTOPEN || kind == SQLITE_FULL);
	return memory_format("%s%s%s", sqlite3_errstr(code), by_system ? ": " : "", by_system ? strerror(reason) : "");
}

static struct identity identity_of(const char *path)
{
	struct stat status;
	if (lstat(path, &status) != 0)
		return (struct identity){0};
	return (struct identity){.device = status.st_dev, .inode = status.st_ino};
}

static bool is_same(struct identity one, struct identity other)
{
	return one.device == other.device && one.inode == other.inode && one.inode != 0;
}

/* Whether the connection has its files open under names that lead elsewhere by now, or nowhere. */
static bool has_moved(const struct spool *spool)
{
	const char *const paths[FILES] = {spool->path, spool->wal, spool->index};
	for (int i = 0; i < FILES; i++)
		if (!is_same(identity_of(paths[i]), spool->files[i]))
			return true;
	return false;
}

static void close_untouched(sqlite3 *database)
{
	if (database != NULL)
		sqlite3_db_config(database, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, NULL);
	sqlite3_close_v2(database);
}

/* End the connection. What cannot be found again by its name is kept until its rows have been carried over. */
static void detach(struct spool *spool)
{
	for (int i = 0; i < STATEMENTS; i++)
		sqlite3_finalize(spool->statements[i]);
	memset(spool->statements, 0, sizeof spool->statements);
	bool known = spool->database != NULL && spool->files[FILE_ITSELF].inode != 0;
	if (known && spool->moved == NULL && has_moved(spool))
		spool->moved = spool->database;
	else if (spool->damaged || spool->moved != NULL) /* left as they are, with the WAL */
		close_untouched(spool->database);
	else
		sqlite3_close_v2(spool->database);
	spool->database = NULL;
	atomic_store(&spool->readable, false);
}

static void note_bytes(struct spool *spool)
{
	struct stat status;
	uint64_t bytes = 0;
	const char *const paths[] = {spool->path, spool->wal, spool->index};
	for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
		bytes += lstat(paths[i], &status) == 0 && S_ISREG(status.st_mode) ? (uint64_t)status.st_size : 0;
	atomic_store(&spool->bytes, bytes);
	atomic_store(&spool->readable, spool->database != NULL && !spool->damaged);
}

/* End the transaction, if there is one, and give the result that `code` means. */
static enum spool_result give_up(struct spool *spool, const char *doing, int code, char *error, size_t error_size)
{
	bool full = is_full(spool->database, code);
	char *text = describe(spool->database, code);
	if (spool->database != NULL)
		for (int i = 0; i < STATEMENTS; i++)
			sqlite3_reset(spool->statements[i]);
	if (spool->database != NULL && !sqlite3_get_autocommit(spool->database))
		sqlite3_exec(spool->database, "ROLLBACK", NULL, NULL, NULL);
	snprintf(error, error_size, "cannot %s the spool %s: %s", doing, spool->path, text);
	free(text);
	if (full)
		return SPOOL_FULL;
	spool->damaged |= is_damage(code);
	detach(spool);
	note_bytes(spool);
	return SPOOL_FAILED;
}

static bool is_attached(const struct spool *spool, char *error, size_t error_size)
{
	if (spool->database != NULL)
		return true;
	snprintf(error, error_size, "the spool %s failed before", spool->path);
	return false;
}

/* ---- statements ---- */

/* Run a statement that gives no row, and reset it. SQLITE_OK or the error. */
static int run(struct spool *spool, enum statement which)
{
	int code = sqlite3_step(spool->statements[which]);
	sqlite3_reset(spool->statements[which]);
	return code == SQLITE_DONE || code == SQLITE_ROW ? SQLITE_OK : code;
}

/* The number a statement gives, or `otherwise` where it gives no row. */
static int query_number(struct spool *spool, enum statement which, int64_t otherwise, int64_t *number)
{
	int code = sqlite3_step(spool->statements[which]);
	*number = code == SQLITE_ROW ? sqlite3_column_int64(spool->statements[which], 0) : otherwise;
	sqlite3_reset(spool->statements[which]);
	return code == SQLITE_ROW || code == SQLITE_DONE ? SQLITE_OK : code;
}

static int write_tally(struct spool *spool, int64_t messages, int64_t next_row)
{
	sqlite3_bind_int64(spool->statements[COUNT], 1, messages);
	sqlite3_bind_int64(spool->statements[COUNT], 2, next_row);
	return run(spool, COUNT);
}

static int refresh_oldest(struct spool *spool)
{
	int64_t oldest;
	int code = query_number(spool, OLDEST, 0, &oldest);
	atomic_store(&spool->oldest_ms, oldest);
	return code;
}

/* ---- room on disk ---- */

/* How many pages rows take at most when they are added one behind the other. */
struct footprint {
	int64_t leaves, overflows;
	size_t left; /* bytes in the last leaf */
};

static void add_to_footprint(struct footprint *footprint, const struct spool_row *row)
{
	enum {
		LEAF_BYTES = SPOOL_PAGE - 8,
		COLUMNS_MOST = 96, /* of a row beside its bytes: header, numbers, what the cell adds */
		LOCAL_MOST = SPOOL_PAGE - 35,
		OVERFLOW_BYTES = SPOOL_PAGE - 4,
	};
	size_t bytes = spool_row_bytes(row) + COLUMNS_MOST;
	if (bytes > LOCAL_MOST) {
		footprint->overflows += (int64_t)(bytes / OVERFLOW_BYTES) + 1;
		bytes = LOCAL_MOST;
	}
	if (footprint->left < bytes) {
		footprint->leaves++;
		footprint->left = LEAF_BYTES;
	}
	footprint->left -= bytes;
}

/* The pages a transaction with these rows may write: theirs, those above them, and the list of free pages. */
static int64_t count_frames(const struct footprint *footprint)
{
	enum { CHILDREN_LEAST = 200, LISTED = 1000 };
	return FIXED_FRAMES + footprint->leaves + footprint->overflows + footprint->leaves / CHILDREN_LEAST +
	       (footprint->leaves + footprint->overflows) / LISTED;
}

static int64_t size_of(const char *path)
{
	struct stat status;
	return lstat(path, &status) == 0 && S_ISREG(status.st_mode) ? (int64_t)status.st_size : 0;
}

static int64_t largest(int64_t one, int64_t other)
{
	return one > other ? one : other;
}

static int64_t reserve_of(const struct spool *spool)
{
	return RESERVE_BYTES + (int64_t)atomic_load(&spool->max_size) / 512;
}

/* What may be on disk once `frames` are in the WAL, and later, of them `added` pages more than now, in the file. */
static int reckon(struct spool *spool, int64_t frames, int64_t added, int64_t *bytes)
{
	int64_t pages, unused;
	int code = query_number(spool, PAGES, 0, &pages);
	if (code == SQLITE_OK)
		code = query_number(spool, FREE_PAGES, 0, &unused);
	if (code != SQLITE_OK)
		return code;
	int64_t all_frames = spool->wal_frames + frames;
	int64_t wal = largest(size_of(spool->wal), SPOOL_WAL_HEADER + all_frames * FRAME_BYTES);
	int64_t index = largest(size_of(spool->index), ((all_frames + 64) / INDEX_FRAMES + 1) * INDEX_BYTES);
	*bytes = (pages + largest(added - unused, 0)) * SPOOL_PAGE + wal + index;
	return SQLITE_OK;
}

/* Copy the WAL into the file. All of it was copied and it is empty: SQLITE_OK. A reader that needs it: SQLITE_BUSY. */
static int empty_wal(struct spool *spool)
{
	int frames = 0, copied = 0;
	int code = sqlite3_wal_checkpoint_v2(spool->database, NULL, SQLITE_CHECKPOINT_TRUNCATE, &frames, &copied);
	if (code == SQLITE_OK)
		spool->wal_frames = 0;
	return code;
}

/* Whether `frames` more fit below spool.max_size with `kept` bytes to spare: *fits. The WAL is emptied when that helps.
 */
/* What the spool may take on disk: spool.max_size, or what it has and what is free if that is less. A spool that has
 * filled its disk has no room for the log that removing needs. */
static int64_t most_bytes(const struct spool *spool)
{
	int64_t most = (int64_t)atomic_load(&spool->max_size);
	struct statvfs disk;
	if (statvfs(spool->directory, &disk) != 0)
		return most;
	int64_t here = size_of(spool->path) + size_of(spool->wal) + size_of(spool->index) +
	               (int64_t)disk.f_bavail * (int64_t)disk.f_frsize;
	return here < most ? here : most;
}

static int find_room(struct spool *spool, int64_t frames, int64_t added, int64_t kept, bool *fits)
{
	int64_t bytes = 0, most = most_bytes(spool) - kept;
	int code = reckon(spool, frames, added, &bytes);
	*fits = bytes <= most;
	if (code != SQLITE_OK || *fits || size_of(spool->wal) == 0)
		return code;
	code = empty_wal(spool);
	/* A reader beside, or a disk so full that the file cannot grow: then it does not fit. */
	if ((code & 0xff) == SQLITE_BUSY || is_full(spool->database, code))
		return SQLITE_OK;
	if (code == SQLITE_OK)
		code = reckon(spool, frames, added, &bytes);
	*fits = bytes <= most;
	return code;
}

/* After a transaction, which is durable whatever happens here. */
static void tidy_wal(struct spool *spool)
{
	int frames, copied;
	int64_t most = (int64_t)atomic_load(&spool->max_size) / 8;
	if (most > WAL_BYTES)
		most = WAL_BYTES;
	if (spool->wal_frames * FRAME_BYTES < most)
		return;
	int code = sqlite3_wal_checkpoint_v2(spool->database, NULL, SQLITE_CHECKPOINT_PASSIVE, &frames, &copied);
	if (code == SQLITE_OK || (code & 0xff) == SQLITE_BUSY || is_full(spool->database, code))
		return;
	char error[512];
	give_up(spool, "copy the write-ahead log of", code, error, sizeof error);
	log_error("spool", "%s", error);
}

/* Give the disk back when the last message is gone. Needs room for what is left, be it a few pages above the limit. */
static void shrink(struct spool *spool)
{
	enum { FEW_PAGES = 16 };
	int64_t pages, unused;
	bool fits = false;
	if (query_number(spool, PAGES, 0, &pages) != SQLITE_OK ||
	    pages * SPOOL_PAGE + size_of(spool->wal) <= SHRUNK_BYTES ||
	    query_number(spool, FREE_PAGES, 0, &unused) != SQLITE_OK ||
	    find_room(spool, pages - unused + FIXED_FRAMES, 0, 0, &fits) != SQLITE_OK ||
	    (!fits && pages - unused > FEW_PAGES))
		return;
	int code = sqlite3_exec(spool->database, "VACUUM", NULL, NULL, NULL);
	if (code == SQLITE_OK)
		code = empty_wal(spool);
	if (code == SQLITE_OK || (code & 0xff) == SQLITE_BUSY || is_full(spool->database, code))
		return;
	char error[512];
	give_up(spool, "shrink", code, error, sizeof error);
	log_error("spool", "%s", error);
}

/* SQLite tells after each commit how long the WAL is. */
static int on_wal(void *owner, sqlite3 *database, const char *name, int frames)
{
	struct spool *spool = owner;
	spool->wal_frames = frames;
	return SQLITE_OK;
}

/* ---- a connection ---- */

/* SQLite would make it readable to others. */
static void make_file(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd >= 0)
		close(fd);
}

static int open_file(const char *path, int flags, sqlite3 **database)
{
	int code = sqlite3_open_v2(path, database, flags | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_NOFOLLOW, NULL);
	if (code != SQLITE_OK)
		return code;
	sqlite3_extended_result_codes(*database, 1);
	sqlite3_busy_timeout(*database, BUSY_MS);
	return SQLITE_OK;
}

/* The number the query gives, or -1 with *code. */
static int64_t ask_number(sqlite3 *database, const char *sql, int *code)
{
	sqlite3_stmt *statement = NULL;
	int64_t number = -1;
	*code = sqlite3_prepare_v2(database, sql, -1, &statement, NULL);
	if (*code == SQLITE_OK) {
		*code = sqlite3_step(statement);
		if (*code == SQLITE_ROW)
			number = sqlite3_column_int64(statement, 0);
		*code = *code == SQLITE_ROW || *code == SQLITE_DONE ? SQLITE_OK : *code;
	}
	sqlite3_finalize(statement);
	return number;
}

static int make_tables(sqlite3 *database)
{
	int code = sqlite3_exec(database, "BEGIN IMMEDIATE", NULL, NULL, NULL);
	for (int i = 0; code == SQLITE_OK && i < TABLES; i++)
		code = sqlite3_exec(database, SCHEMA[i], NULL, NULL, NULL);
	char *rest = memory_format("INSERT INTO tally VALUES (0, 1, 0); PRAGMA application_id = %d; "
	                           "PRAGMA user_version = %d; COMMIT",
	                           SPOOL_APPLICATION, SPOOL_FORMAT);
	if (code == SQLITE_OK)
		code = sqlite3_exec(database, rest, NULL, NULL, NULL);
	free(rest);
	return code;
}

/* The tables are ours, to the letter. */
static int check_tables(sqlite3 *database)
{
	sqlite3_stmt *statement = NULL;
	int code = sqlite3_prepare_v2(database, "SELECT sql FROM sqlite_schema ORDER BY rowid", -1, &statement, NULL);
	bool same = code == SQLITE_OK;
	for (int i = 0; same && i < TABLES; i++) {
		code = sqlite3_step(statement);
		const char *sql = code == SQLITE_ROW ? (const char *)sqlite3_column_text(statement, 0) : NULL;
		same = sql != NULL && strcmp(sql, SCHEMA[i]) == 0;
	}
	if (same)
		code = sqlite3_step(statement);
	sqlite3_finalize(statement);
	if (code != SQLITE_ROW && code != SQLITE_DONE)
		return code;
	return same && code == SQLITE_DONE ? SQLITE_OK : SQLITE_CORRUPT;
}

static int check_structure(sqlite3 *database)
{
	sqlite3_stmt *statement = NULL;
	int code = sqlite3_prepare_v2(database, "PRAGMA quick_check(1)", -1, &statement, NULL);
	if (code == SQLITE_OK)
		code = sqlite3_step(statement);
	bool well = code == SQLITE_ROW && strcmp((const char *)sqlite3_column_text(statement, 0), "ok") == 0;
	sqlite3_finalize(statement);
	if (code != SQLITE_ROW && code != SQLITE_DONE)
		return code;
	return well ? SQLITE_OK : SQLITE_CORRUPT;
}

/* SQLITE_OK: ours, or *is_new, with nothing in it. Reads only. */
static int identify(sqlite3 *database, bool *is_new)
{
	int code;
	int64_t tables = 0, version = 0, page_size = 0,
		application = ask_number(database, "PRAGMA application_id", &code);
	if (code == SQLITE_OK)
		tables = ask_number(database, "SELECT count(*) FROM sqlite_schema", &code);
	if (code == SQLITE_OK)
		version = ask_number(database, "PRAGMA user_version", &code);
	if (code == SQLITE_OK)
		page_size = ask_number(database, "PRAGMA page_size", &code);
	*is_new = application == 0 && tables == 0 && page_size == SPOOL_PAGE;
	if (code != SQLITE_OK || *is_new)
		return code;
	return application == SPOOL_APPLICATION && version == SPOOL_FORMAT && page_size == SPOOL_PAGE ? SQLITE_OK
	                                                                                              : SQLITE_NOTADB;
}

static int check_file(sqlite3 *database)
{
	int code = check_tables(database);
	int64_t pages = code == SQLITE_OK ? ask_number(database, "PRAGMA page_count", &code) : 0;
	if (code == SQLITE_OK && pages * SPOOL_PAGE <= CHECKED_BYTES)
		return check_structure(database);
	if (code == SQLITE_OK)
		ask_number(database, "SELECT min(row) FROM message", &code);
	if (code == SQLITE_OK)
		ask_number(database, "SELECT max(row) FROM message", &code);
	return code;
}

/* Every commit to the WAL, with an fsync. A file system on which SQLite cannot have a WAL is refused. */
static int set_durable(sqlite3 *database)
{
	sqlite3_stmt *statement = NULL;
	if (sqlite3_db_readonly(database, "main") == 1)
		return SQLITE_READONLY;
	int code = sqlite3_prepare_v2(database, "PRAGMA journal_mode = WAL", -1, &statement, NULL);
	if (code == SQLITE_OK)
		code = sqlite3_step(statement);
	bool is_wal = code == SQLITE_ROW && strcmp((const char *)sqlite3_column_text(statement, 0), "wal") == 0;
	sqlite3_finalize(statement);
	if (code != SQLITE_ROW)
		return code == SQLITE_DONE ? SQLITE_CANTOPEN : code;
	if (!is_wal)
		return SQLITE_CANTOPEN;
	return sqlite3_exec(database, "PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0", NULL, NULL, NULL);
}

static int prepare(struct spool *spool)
{
	static const char settings[] = "PRAGMA temp_store = MEMORY; PRAGMA mmap_size = 0; PRAGMA secure_delete = OFF; "
				       "PRAGMA cell_size_check = ON; PRAGMA trusted_schema = OFF";
	bool is_new = false;
	int code = sqlite3_exec(spool->database, settings, NULL, NULL, NULL);
	if (code == SQLITE_OK)
		code = identify(spool->database, &is_new);
	if (code == SQLITE_OK)
		code = set_durable(spool->database);
	int64_t most = (int64_t)atomic_load(&spool->max_size);
	char *sizes = memory_format("PRAGMA cache_size = -%d; PRAGMA journal_size_limit = %" PRId64
	                            "; PRAGMA max_page_count = %" PRId64,
	                            CACHE_KIB, most / 8 < WAL_BYTES ? most / 8 : WAL_BYTES, most / SPOOL_PAGE);
	if (code == SQLITE_OK)
		code = sqlite3_exec(spool->database, sizes, NULL, NULL, NULL);
	free(sizes);
	if (code == SQLITE_OK)
		code = is_new ? make_tables(spool->database) : check_file(spool->database);
	for (int i = 0; code == SQLITE_OK && i < STATEMENTS; i++)
		code = sqlite3_prepare_v3(spool->database, SQL[i], -1, SQLITE_PREPARE_PERSISTENT, &spool->statements[i],
		                          NULL);
	sqlite3_wal_hook(spool->database, on_wal, spool);
	return code;
}

/* Whether this process has that file open. Where that cannot be told it is believed. */
static bool is_open_here(struct identity file)
{
	DIR *entries = opendir("/proc/self/fd");
	bool found = entries == NULL;
	struct stat status;
	for (const struct dirent *entry; !found && (entry = readdir(entries)) != NULL;)
		found = fstatat(dirfd(entries), entry->d_name, &status, 0) == 0 && status.st_ino == file.inode &&
		        status.st_dev == file.device;
	if (entries != NULL)
		closedir(entries);
	return found;
}

/* Remember which files SQLite has opened. False: somebody was quicker, and what the names lead to is not them. */
static bool note_files(struct spool *spool)
{
	const char *const paths[FILES] = {spool->path, spool->wal, spool->index};
	bool ours = true;
	for (int i = 0; i < FILES; i++) {
		spool->files[i] = identity_of(paths[i]);
		ours = ours && is_open_here(spool->files[i]);
	}
	return ours;
}

/* The whole file in memory, or NULL: there is none, it is empty or cannot be read. */
static uint8_t *read_whole(const char *path, size_t *length)
{
	int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	int64_t size = fd >= 0 ? size_of(path) : 0;
	uint8_t *bytes = NULL;
	*length = 0;
	if (size > 0 && size <= WAL_READ_MOST) {
		bytes = memory_resize(NULL, (size_t)size);
		for (ssize_t got; *length < (size_t)size; *length += (size_t)got)
			if ((got = pread(fd, bytes + *length, (size_t)size - *length, (off_t)*length)) <= 0)
				break;
	}
	if (fd >= 0)
		close(fd);
	return bytes;
}

/* ---- rows of a WAL whose end is not believed ---- */

struct tail {
	struct spool *spool;
	sqlite3_stmt *insert;
	int code;
	int64_t inserted, greatest;
};

static bool take_tail_row(void *owner, const struct spool_row *row)
{
	struct tail *tail = owner;
	spool_row_bind(tail->insert, row);
	tail->code = sqlite3_step(tail->insert);
	sqlite3_reset(tail->insert);
	if (tail->code != SQLITE_DONE)
		return false;
	tail->code = SQLITE_OK;
	tail->inserted += sqlite3_changes(tail->spool->database);
	tail->greatest = largest(tail->greatest, row->record.row);
	return true;
}

/* A transaction behind the WAL's believed end is what a flipped bit in an earlier one looks like, or a power cut in the
 * last. Its rows are right or not by their own checksums. */
static int take_tail(struct spool *spool, const uint8_t *wal, size_t wal_bytes, size_t frames)
{
	struct spool_salvage salvage = {
	    .file = -1, .wal = wal, .wal_bytes = wal_bytes, .first_frame = frames, .least_row = spool->next_row};
	struct tail tail = {.spool = spool, .greatest = spool->next_row - 1};
	int code = sqlite3_prepare_v2(spool->database, INSERT_ROW_UNLESS_THERE, -1, &tail.insert, NULL);
	int64_t messages = (int64_t)atomic_load(&spool->messages);
	if (code == SQLITE_OK)
		code = run(spool, BEGIN);
	if (code == SQLITE_OK) {
		spool_salvage(&salvage, take_tail_row, &tail);
		code = tail.code;
	}
	if (code == SQLITE_OK)
		code = write_tally(spool, messages + tail.inserted, tail.greatest + 1);
	if (code == SQLITE_OK)
		code = run(spool, COMMIT);
	sqlite3_finalize(tail.insert);
	if (code != SQLITE_OK)
		return code;
	atomic_store(&spool->messages, (uint64_t)(messages + tail.inserted));
	spool->next_row = tail.greatest + 1;
	log_warn("spool",
	         "the end of %s is damaged or was cut off by a crash; %" PRId64 " messages were read from behind",
	         spool->wal, tail.inserted);
	return SQLITE_OK;
}

/* Everything that a new connection needs to know and do before it is used. `wal` is the WAL as it was found. */
static int begin_use(struct spool *spool, const uint8_t *wal, size_t wal_bytes)
{
	int frames = 0, copied = 0;
	int64_t next_row = 1, messages = 0;
	int code = sqlite3_step(spool->statements[TALLY]);
	if (code == SQLITE_ROW) {
		messages = sqlite3_column_int64(spool->statements[TALLY], 0);
		next_row = sqlite3_column_int64(spool->statements[TALLY], 1);
	}
	sqlite3_reset(spool->statements[TALLY]);
	if (code != SQLITE_ROW || messages < 0 || next_row < 1)
		return code == SQLITE_ROW || code == SQLITE_DONE ? SQLITE_CORRUPT : code;
	atomic_store(&spool->messages, (uint64_t)messages);
	spool->next_row = largest(spool->next_row, next_row);
	code = sqlite3_wal_checkpoint_v2(spool->database, NULL, SQLITE_CHECKPOINT_PASSIVE, &frames, &copied);
	spool->wal_frames = frames > 0 ? frames : 0;
	if ((code == SQLITE_OK || (code & 0xff) == SQLITE_BUSY) && wal != NULL && frames >= 0 &&
	    spool_salvage_has_tail(wal, wal_bytes, (size_t)frames))
		code = take_tail(spool, wal, wal_bytes, (size_t)frames);
	if (code == SQLITE_OK)
		code = empty_wal(spool);
	if ((code & 0xff) ==
	    SQLITE_BUSY) /* a reader beside: it holds the index, in which only what is committed counts */
		code = SQLITE_OK;
	return code == SQLITE_OK ? refresh_oldest(spool) : code;
}

/* One attempt. On an error the connection is closed again. */
static int connect_file(struct spool *spool, bool *full, char **text)
{
	size_t wal_bytes;
	uint8_t *wal = read_whole(spool->wal, &wal_bytes);
	bool is_new = size_of(spool->path) == 0;
	int code;
	*full = false;
	*text = NULL;
	memset(spool->files, 0, sizeof spool->files);
	make_file(spool->path);
	struct stat status;
	bool is_link = lstat(spool->path, &status) == 0 && S_ISLNK(status.st_mode);
	/* A WAL without its file: SQLite would delete it. */
	code = is_link ? SQLITE_CANTOPEN_SYMLINK : is_new && wal_bytes > SPOOL_WAL_HEADER ? SQLITE_CORRUPT : SQLITE_OK;
	if (code == SQLITE_OK)
		code = open_file(spool->path, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, &spool->database);
	if (code == SQLITE_OK)
		code = prepare(spool);
	if (code == SQLITE_OK && !note_files(spool))
		code = SQLITE_CANTOPEN;
	if (code == SQLITE_OK)
		code = begin_use(spool, wal, wal_bytes);
	if (code == SQLITE_OK && !directory_sync(spool->directory))
		code = SQLITE_IOERR_DIR_FSYNC;
	/* Tables that are not ours, or not any more. */
	if ((code & 0xff) == SQLITE_ERROR)
		code = SQLITE_CORRUPT;
	free(wal);
	if (code == SQLITE_OK)
		return SQLITE_OK;
	*full = is_full(spool->database, code);
	*text = describe(spool->database, code);
	spool->damaged = is_damage(code);
	detach(spool);
	return code;
}

/* ---- recovery of a damaged file ---- */

struct recovery {
	struct spool *spool;
	char *path; /* PATH.recovering */
	sqlite3 *source, *target;
	sqlite3_stmt *insert;
	int code; /* of the target */
	int64_t first_row, greatest, recovered;
	int64_t expected; /* messages by the tally, or -1 */
};

static bool keep_row(void *owner, const struct spool_row *row)
{
	struct recovery *recovery = owner;
	spool_row_bind(recovery->insert, row);
	recovery->code = sqlite3_step(recovery->insert);
	sqlite3_reset(recovery->insert);
	if (recovery->code != SQLITE_DONE)
		return false;
	recovery->code = SQLITE_OK;
	recovery->recovered += sqlite3_changes(recovery->target);
	recovery->greatest = largest(recovery->greatest, row->record.row);
	return true;
}

static int make_target(struct recovery *recovery)
{
	unlink(recovery->path);
	make_file(recovery->path);
	int code = open_file(recovery->path, SQLITE_OPEN_READWRITE, &recovery->target);
	if (code == SQLITE_OK)
		code = sqlite3_exec(recovery->target,
		                    "PRAGMA page_size = 4096; PRAGMA journal_mode = OFF; PRAGMA secure_delete = OFF; "
		                    "PRAGMA synchronous = FULL",
		                    NULL, NULL, NULL);
	if (code == SQLITE_OK)
		code = make_tables(recovery->target);
	if (code == SQLITE_OK)
		code = sqlite3_prepare_v2(recovery->target, INSERT_ROW_UNLESS_THERE, -1, &recovery->insert, NULL);
	if (code == SQLITE_OK)
		code = sqlite3_exec(recovery->target, "BEGIN", NULL, NULL, NULL);
	return code;
}

/* What SQLite still reads, in order, up to the first error. */
static void copy_rows(struct recovery *recovery)
{
	sqlite3_stmt *statement = NULL;
	struct spool_row row;
	int code = open_file(recovery->spool->path, SQLITE_OPEN_READONLY, &recovery->source);
	if (code != SQLITE_OK)
		return;
	sqlite3_db_config(recovery->source, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, NULL);
	/* Reads on although the file is shorter than its header says. */
	sqlite3_exec(recovery->source, "PRAGMA mmap_size = 0; PRAGMA writable_schema = ON", NULL, NULL, NULL);
	int64_t next_row = ask_number(recovery->source, "SELECT next_row FROM tally", &code);
	if (next_row > 0 && next_row < INT64_MAX / 2)
		recovery->greatest = next_row - 1;
	recovery->expected = ask_number(recovery->source, "SELECT messages FROM tally", &code);
	code = sqlite3_prepare_v2(recovery->source, SQL[READ], -1, &statement, NULL);
	if (code == SQLITE_OK)
		sqlite3_bind_int64(statement, 1, 0);
	while (code == SQLITE_OK && recovery->code == SQLITE_OK && sqlite3_step(statement) == SQLITE_ROW) {
		if (!spool_row_take(statement, &row))
			continue;
		if (recovery->first_row == 0)
			recovery->first_row = row.record.row;
		keep_row(recovery, &row);
	}
	sqlite3_finalize(statement);
}

/* Rows below the first that SQLite reads were deleted. */
static void search_pages(struct recovery *recovery)
{
	size_t wal_bytes;
	uint8_t *wal = read_whole(recovery->spool->wal, &wal_bytes);
	struct spool_salvage salvage = {
	    .file = open(recovery->spool->path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC),
	    .wal = wal_bytes > SPOOL_WAL_HEADER ? wal : NULL,
	    .wal_bytes = wal_bytes,
	    .least_row = recovery->first_row > 0 ? recovery->first_row : 1,
	};
	spool_salvage(&salvage, keep_row, recovery);
	if (salvage.file >= 0)
		close(salvage.file);
	free(wal);
}

static bool sync_file(const char *path)
{
	int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	bool synced = fd >= 0 && fsync(fd) == 0;
	if (fd >= 0)
		close(fd);
	return synced;
}

static int finish_target(struct recovery *recovery)
{
	int64_t next_row = largest(recovery->greatest + 1, recovery->spool->next_row);
	char *sql = memory_format("UPDATE tally SET messages = %" PRId64 ", next_row = %" PRId64 "; COMMIT",
	                          recovery->recovered, next_row);
	int code = recovery->code;
	if (code == SQLITE_OK)
		code = sqlite3_exec(recovery->target, sql, NULL, NULL, NULL);
	free(sql);
	return code;
}

/* A name beside the file that says what has become of it and when, and is not taken. Allocated. */
static char *name_aside(const struct spool *spool, const char *kind)
{
	char time_text[32];
	time_t now = time(NULL);
	struct tm parts;
	strftime(time_text, sizeof time_text, "%Y%m%dT%H%M%SZ", gmtime_r(&now, &parts));
	char *aside = memory_format("%s.%s-%s", spool->path, kind, time_text);
	for (int i = 2; access(aside, F_OK) == 0; i++) {
		free(aside);
		aside = memory_format("%s.%s-%s-%d", spool->path, kind, time_text, i);
	}
	return aside;
}

/* See the head of this file. Names the file that was there, for the log. */
static bool put_in_place(struct spool *spool, const char *kind, char **aside)
{
	char *recovered = memory_format("%s.recovered", spool->path);
	*aside = name_aside(spool, kind);
	char *aside_wal = memory_format("%s-wal", *aside);
	if (size_of(spool->wal) == 0)
		unlink(spool->wal);
	bool done = (rename(spool->path, *aside) == 0 || errno == ENOENT) &&
	            (rename(spool->wal, aside_wal) == 0 || errno == ENOENT) &&
	            (unlink(spool->index) == 0 || errno == ENOENT) && directory_sync(spool->directory) &&
	            rename(recovered, spool->path) == 0 && directory_sync(spool->directory);
	free(aside_wal);
	free(recovered);
	return done;
}

/* What a recovery that did not come to its end has left. */
static bool finish_recovery(struct spool *spool)
{
	char *recovered = memory_format("%s.recovered", spool->path), *aside = NULL;
	bool done = access(recovered, F_OK) != 0 || put_in_place(spool, "corrupt", &aside);
	free(recovered);
	free(aside);
	return done;
}

static void report_recovery(const struct recovery *recovery, const char *reason, const char *aside)
{
	char lost[80] = "how many could not be read is not known";
	if (recovery->expected >= recovery->recovered)
		snprintf(lost, sizeof lost, "%" PRId64 " could not be read", recovery->expected - recovery->recovered);
	log_error("spool",
	          "%s is damaged or no spool of this version (%s): set aside as %s; %" PRId64
	          " messages were taken over, %s",
	          recovery->spool->path, reason, aside, recovery->recovered, lost);
}

/* False with errno when the damaged file cannot be replaced, for want of room or rights. */
static bool recover(struct spool *spool, const char *reason)
{
	struct recovery recovery = {
	    .spool = spool, .path = memory_format("%s.recovering", spool->path), .expected = -1};
	char *recovered = memory_format("%s.recovered", spool->path), *aside = NULL;
	int code = make_target(&recovery);
	if (code == SQLITE_OK) {
		if (size_of(spool->path) > 0) /* of an empty file SQLite would delete the WAL */
			copy_rows(&recovery);
		sqlite3_close_v2(recovery.source);
		if (recovery.code == SQLITE_OK && recovery.recovered != recovery.expected)
			search_pages(&recovery);
		code = finish_target(&recovery);
	}
	int system_error = recovery.target != NULL ? sqlite3_system_errno(recovery.target) : EIO;
	sqlite3_finalize(recovery.insert);
	sqlite3_close_v2(recovery.target);
	bool done = code == SQLITE_OK && sync_file(recovery.path) && rename(recovery.path, recovered) == 0 &&
	            directory_sync(spool->directory) && put_in_place(spool, "corrupt", &aside);
	int failure = code == SQLITE_OK ? errno : is_full(NULL, code) ? ENOSPC : system_error;
	if (done)
		report_recovery(&recovery, reason, aside);
	else
		unlink(recovery.path);
	free(aside);
	free(recovered);
	free(recovery.path);
	errno = failure;
	return done;
}

/* ---- opening and closing ---- */

static void set_paths(struct spool *spool, char *directory)
{
	const char *slash = strrchr(spool->configured, '/');
	const char *name = slash != NULL ? slash + 1 : spool->configured;
	free(spool->path);
	free(spool->wal);
	free(spool->index);
	free(spool->lock);
	free(spool->directory);
	spool->directory = directory;
	spool->path = memory_format("%s/%s", strcmp(directory, "/") != 0 ? directory : "", name);
	spool->wal = memory_format("%s-wal", spool->path);
	spool->index = memory_format("%s-shm", spool->path);
	spool->lock = memory_format("%s.lock", spool->path);
}

/* Find out what directory it is, whatever links lead there: SQLite would go by the names each time. */
static bool settle_directory(struct spool *spool, bool make, bool *refused, char *error, size_t error_size)
{
	char reason[512];
	char *directory = directory_of(spool->configured);
	char *settled = directory_settle(directory, make, refused, reason, sizeof reason);
	if (settled != NULL) {
		set_paths(spool, settled);
		spool->settled = true;
	} else {
		snprintf(error, error_size, "cannot open the spool %s: its directory: %s%s", spool->configured, reason,
		         *refused ? "; or choose another with spool.path" : "");
	}
	free(directory);
	return settled != NULL;
}

static long lock_holder(int fd)
{
	char text[32] = "";
	return pread(fd, text, sizeof text - 1, 0) > 0 ? strtol(text, NULL, 10) : 0;
}

static int open_lock(const struct spool *spool)
{
	int directory = directory_open(spool->directory);
	if (directory < 0)
		return -1;
	int fd = directory_open_file(directory, strrchr(spool->lock, '/') + 1, O_RDWR | O_CREAT);
	int reason = errno;
	close(directory);
	errno = reason;
	return fd;
}

/* False with `error`; *refused: no retry will help, it is another process's, or in a directory that others may change.
 */
static bool take_lock(struct spool *spool, bool *refused, char *error, size_t error_size)
{
	*refused = false;
	if (!spool->settled && !settle_directory(spool, false, refused, error, error_size))
		return false;
	int fd = open_lock(spool);
	if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0) {
		if (ftruncate(fd, 0) == 0)
			dprintf(fd, "%ld\n", (long)getpid());
		if (spool->lock_fd >= 0) /* of a lock that somebody has deleted */
			close(spool->lock_fd);
		spool->lock_fd = fd;
		return true;
	}
	*refused = fd >= 0 && errno == EWOULDBLOCK;
	if (*refused)
		snprintf(error, error_size,
		         "another mqtt2mongo (process %ld) uses the spool %s; give this one its own spool.path or "
		         "state_dir",
		         lock_holder(fd), spool->path);
	else
		snprintf(error, error_size, "cannot lock %s: %s", spool->lock, strerror(errno));
	if (fd >= 0)
		close(fd);
	return false;
}

/* Whether nobody else can take the lock: the file that is locked is the one that others would lock. */
static bool holds_lock(const struct spool *spool)
{
	struct stat status;
	return spool->lock_fd >= 0 && fstat(spool->lock_fd, &status) == 0 &&
	       is_same(identity_of(spool->lock), (struct identity){.device = status.st_dev, .inode = status.st_ino});
}

/* spool.max_size, or the smaller of 1 GiB and a quarter of what is free, of which the spool itself is a part. */
static void settle_size(struct spool *spool)
{
	struct statvfs disk;
	int64_t size = spool->configured_size;
	note_bytes(spool);
	if (size == 0 && statvfs(spool->directory, &disk) == 0) {
		size = ((int64_t)disk.f_bavail * (int64_t)disk.f_frsize + (int64_t)atomic_load(&spool->bytes)) / 4;
		size = size > LARGEST_DEFAULT ? LARGEST_DEFAULT : size;
	}
	atomic_store(&spool->max_size, (uint64_t)largest(size, SMALLEST_BYTES));
}

/* ---- a file that is not in place any more ---- */

/* Copy the rows below `end`, each column as it is. What damage hides is left out. */
static int copy_table(struct recovery *recovery, const char *table, int64_t end, int64_t *copied)
{
	sqlite3_stmt *from = NULL, *into = NULL;
	char *read = memory_format("SELECT " SPOOL_COLUMN_NAMES " FROM %s WHERE row < ? ORDER BY row", table);
	char *insert =
	    memory_format("INSERT INTO %s (" SPOOL_COLUMN_NAMES ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", table);
	int code = sqlite3_prepare_v2(recovery->source, read, -1, &from, NULL);
	recovery->code = sqlite3_prepare_v2(recovery->target, insert, -1, &into, NULL);
	sqlite3_bind_int64(from, 1, end);
	while (code == SQLITE_OK && recovery->code == SQLITE_OK && (code = sqlite3_step(from)) == SQLITE_ROW) {
		for (int i = 0; i < SPOOL_COLUMNS; i++)
			sqlite3_bind_value(into, i + 1, sqlite3_column_value(from, i));
		code = SQLITE_OK;
		recovery->code = sqlite3_step(into);
		sqlite3_reset(into);
		if (recovery->code == SQLITE_DONE) {
			recovery->code = SQLITE_OK;
			++*copied;
		}
	}
	sqlite3_finalize(from);
	sqlite3_finalize(into);
	free(read);
	free(insert);
	return code == SQLITE_OK || code == SQLITE_DONE || is_damage(code) ? SQLITE_OK : code;
}

/* Whether the disk has room for all that the open file has. */
static bool has_room_for_copy(const struct spool *spool, sqlite3 *source)
{
	struct statvfs disk;
	int code;
	int64_t pages = ask_number(source, "PRAGMA page_count", &code), unused = 0;
	if (code == SQLITE_OK)
		unused = ask_number(source, "PRAGMA freelist_count", &code);
	return code != SQLITE_OK || statvfs(spool->directory, &disk) != 0 ||
	       (int64_t)disk.f_bavail * (int64_t)disk.f_frsize >= (pages - unused) * SPOOL_PAGE + RESERVE_BYTES;
}

/* Write PATH.recovered from the open file. SQLITE_OK, or the error of either file in words. */
static int copy_file(struct spool *spool, sqlite3 *source, char **text)
{
	struct recovery recovery = {
	    .spool = spool, .source = source, .path = memory_format("%s.recovering", spool->path)};
	char *recovered = memory_format("%s.recovered", spool->path);
	int64_t set_aside = 0;
	int code = make_target(&recovery);
	if (code == SQLITE_OK)
		code = copy_table(&recovery, "message", spool->next_row, &recovery.recovered);
	if (code == SQLITE_OK && recovery.code == SQLITE_OK)
		code = copy_table(&recovery, "damaged", INT64_MAX, &set_aside);
	bool unread = code != SQLITE_OK;
	if (code == SQLITE_OK)
		code = finish_target(&recovery);
	if (code != SQLITE_OK)
		*text = describe(unread ? source : recovery.target, code);
	bool full = !unread && is_full(recovery.target, code);
	sqlite3_finalize(recovery.insert);
	sqlite3_close_v2(recovery.target);
	if (code == SQLITE_OK &&
	    (!sync_file(recovery.path) || rename(recovery.path, recovered) != 0 || !directory_sync(spool->directory))) {
		code = SQLITE_IOERR;
		*text = memory_string(strerror(errno));
	}
	if (code == SQLITE_OK) {
		spool->copy = identity_of(recovered);
		spool->copied = recovery.recovered;
	} else {
		unlink(recovery.path);
	}
	free(recovered);
	free(recovery.path);
	return full ? SQLITE_FULL : code;
}

/* Make a copy of the open file and give it its place. What of ours is there still has nothing that the copy has not;
 * somebody else's file is set aside: *aside. */
static int replace_moved(struct spool *spool, char **aside, char **text)
{
	struct identity before = spool->copy;
	sqlite3 *source = spool->database != NULL ? spool->database : spool->moved;
	if (!has_room_for_copy(spool, source)) {
		*text = memory_string("the disk has no room for a copy");
		return SQLITE_FULL;
	}
	spool->unplaced = true;
	int code = copy_file(spool, source, text);
	if (code != SQLITE_OK)
		return code;
	/* Now, for copying may have taken long. */
	struct identity there = identity_of(spool->path);
	bool foreign = there.inode != 0 && !is_same(there, spool->files[FILE_ITSELF]) && !is_same(there, before);
	if (!foreign) {
		unlink(spool->path);
		unlink(spool->wal);
	}
	if (!put_in_place(spool, "replaced", aside)) {
		*text = memory_format("cannot rename the copy: %s", strerror(errno));
		code = SQLITE_IOERR;
	} else {
		spool->unplaced = false;
	}
	if (!foreign) {
		free(*aside);
		*aside = NULL;
	}
	return code;
}

/* Connect to the copy, which must take a commit. The rows that were carried over are nowhere else then. */
static int adopt_copy(struct spool *spool, char **text)
{
	bool full;
	detach(spool);
	spool->damaged = false;
	int code = connect_file(spool, &full, text);
	if (code == SQLITE_OK && (code = run(spool, TEST)) != SQLITE_OK) {
		full = is_full(spool->database, code);
		*text = describe(spool->database, code);
	}
	bool other = code == SQLITE_OK && (!is_same(spool->files[FILE_ITSELF], spool->copy) ||
	                                   (int64_t)atomic_load(&spool->messages) != spool->copied);
	if (other || (code == SQLITE_OK && has_moved(spool))) {
		code = SQLITE_IOERR;
		*text = memory_string("it was moved again");
	}
	if (code != SQLITE_OK) {
		if (other)
			atomic_store(&spool->messages, (uint64_t)spool->copied); /* not what another file has */
		if (other || is_damage(code))
			spool->copy = (struct identity){0}; /* to be made again */
		spool->damaged = false;
		detach(spool);
		return full ? SQLITE_FULL : code;
	}
	close_untouched(spool->moved);
	spool->moved = NULL;
	spool->copy = (struct identity){0};
	return SQLITE_OK;
}

static void report_move(const struct spool *spool, int64_t expected, const char *aside)
{
	int64_t messages = (int64_t)atomic_load(&spool->messages);
	char unread[64] = "";
	if (messages < expected)
		snprintf(unread, sizeof unread, ", %" PRId64 " could not be read", expected - messages);
	log_error(
	    "spool",
	    "%s was deleted, moved or replaced while it was in use; it was made anew, and the %" PRId64
	    " messages in it were carried over%s%s%s. Leave the spool's files alone while the service runs, and use "
	    "--spool-export to look at them",
	    spool->path, messages, unread, aside != NULL ? "; the file found in its place was set aside as " : "",
	    aside != NULL ? aside : "");
}

/* The connection's files have moved, or spool->moved has some that have: go on in new ones, with all rows. When that
 * cannot be done, what can still be read and removed by this connection stays so. */
static enum spool_result carry_over(struct spool *spool, char *error, size_t error_size)
{
	char *text = NULL, *aside = NULL;
	bool refused;
	int64_t expected = (int64_t)atomic_load(&spool->messages);
	int code = SQLITE_IOERR;
	/* A link may lead to another directory by now. */
	if (!settle_directory(spool, true, &refused, error, error_size) ||
	    (!holds_lock(spool) && !take_lock(spool, &refused, error, error_size)))
		text = memory_string(error);
	else if (spool->database == NULL && is_same(spool->copy, identity_of(spool->path)))
		code = SQLITE_OK;
	else
		code = replace_moved(spool, &aside, &text);
	if (code == SQLITE_OK)
		code = adopt_copy(spool, &text);
	spool->stuck = code != SQLITE_OK;
	if (code == SQLITE_OK)
		report_move(spool, expected, aside);
	else
		snprintf(error, error_size,
		         "the spool %s was deleted, moved or replaced while it was in use and cannot be made anew: %s; "
		         "until then %" PRId64 " messages are only in this process: mend that before you stop it",
		         spool->path, text, expected);
	note_bytes(spool);
	free(text);
	free(aside);
	return code == SQLITE_OK ? SPOOL_OK : code == SQLITE_FULL ? SPOOL_FULL : SPOOL_FAILED;
}

/* The files are in place again, though they could not be replaced: the copy that was made meanwhile must not be taken
 * for a recovery that did not come to its end. */
static bool drop_copy(struct spool *spool)
{
	char *recovered = memory_format("%s.recovered", spool->path);
	bool done =
	    !spool->unplaced || ((unlink(recovered) == 0 || errno == ENOENT) && directory_sync(spool->directory));
	free(recovered);
	spool->unplaced = spool->unplaced && !done;
	return done;
}

/* Before something is written. */
static enum spool_result stay_in_place(struct spool *spool, char *error, size_t error_size)
{
	bool refused;
	if (has_moved(spool))
		return carry_over(spool, error, error_size);
	spool->stuck = false;
	if (!drop_copy(spool)) {
		snprintf(error, error_size, "cannot remove %s.recovered: %s", spool->path, strerror(errno));
		return SPOOL_FAILED;
	}
	return holds_lock(spool) || take_lock(spool, &refused, error, error_size) ? SPOOL_OK : SPOOL_FAILED;
}

/* Lock, connect, and recover if need be. */
static enum spool_result attach(struct spool *spool, char *error, size_t error_size)
{
	bool refused, full;
	if (spool->moved != NULL)
		return carry_over(spool, error, error_size);
	if (!holds_lock(spool) && !take_lock(spool, &refused, error, error_size))
		return SPOOL_FAILED;
	if (!drop_copy(spool) || !finish_recovery(spool)) {
		snprintf(error, error_size, "cannot set the damaged spool %s aside: %s", spool->path, strerror(errno));
		return SPOOL_FAILED;
	}
	if (atomic_load(&spool->max_size) == 0)
		settle_size(spool);
	char *reason = spool->damaged ? memory_string("damage was found in use") : NULL;
	int code = spool->damaged ? SQLITE_CORRUPT : connect_file(spool, &full, &reason);
	if (spool->damaged) {
		if (!recover(spool, reason)) {
			bool no_room = is_no_room(errno);
			snprintf(error, error_size, "the spool %s is damaged (%s) and cannot be recovered: %s",
			         spool->path, reason, strerror(errno));
			free(reason);
			return no_room ? SPOOL_FULL : SPOOL_FAILED;
		}
		free(reason);
		spool->damaged = false;
		code = connect_file(spool, &full, &reason);
	}
	note_bytes(spool);
	if (code != SQLITE_OK)
		snprintf(error, error_size, "cannot open the spool %s: %s", spool->path, reason);
	free(reason);
	return code == SQLITE_OK ? SPOOL_OK : full ? SPOOL_FULL : SPOOL_FAILED;
}

struct spool *spool_open(const struct config_spool *config, char *error, size_t error_size)
{
	struct spool *spool = memory_zeroed(1, sizeof *spool);
	bool refused = false;
	spool->configured = memory_string(config->path);
	set_paths(spool, directory_of(config->path));
	spool->lock_fd = -1;
	spool->configured_size = config->max_size_set ? config->max_size : 0;
	if (!take_lock(spool, &refused, error, error_size) && refused) {
		spool_close(spool);
		return NULL;
	}
	if (attach(spool, error, error_size) != SPOOL_OK)
		log_error("spool", "%s", error);
	return spool;
}

void spool_close(struct spool *spool)
{
	char error[512];
	if (spool == NULL)
		return;
	bool moved = spool->moved != NULL || (spool->database != NULL && has_moved(spool));
	if (moved && atomic_load(&spool->messages) > 0 && carry_over(spool, error, sizeof error) != SPOOL_OK)
		log_error("spool", "%s", error);
	if (!moved)
		drop_copy(spool);
	detach(spool);
	close_untouched(spool->moved);
	if (spool->lock_fd >= 0)
		close(spool->lock_fd);
	free(spool->configured);
	free(spool->path);
	free(spool->wal);
	free(spool->index);
	free(spool->lock);
	free(spool->directory);
	free(spool);
}

/* ---- committing ---- */

static size_t measure(const struct batch *const *batches, size_t count, struct footprint *footprint)
{
	size_t messages = 0;
	for (size_t i = 0; i < count; i++)
		for (size_t j = 0; j < batches[i]->count; j++) {
			if (batches[i]->messages[j].settled)
				continue;
			struct spool_row row = spool_row_of(batches[i], &batches[i]->messages[j], 0);
			add_to_footprint(footprint, &row);
			messages++;
		}
	return messages;
}

static int insert_batch(struct spool *spool, const struct batch *batch, int64_t *next_row)
{
	sqlite3_stmt *statement = spool->statements[INSERT];
	for (size_t i = 0; i < batch->count; i++) {
		if (batch->messages[i].settled)
			continue;
		struct spool_row row = spool_row_of(batch, &batch->messages[i], (*next_row)++);
		spool_row_bind(statement, &row);
		int code = sqlite3_step(statement);
		sqlite3_reset(statement);
		if (code != SQLITE_DONE)
			return code;
	}
	return SQLITE_OK;
}

static int64_t oldest_of(const struct batch *const *batches, size_t count)
{
	for (size_t i = 0; i < count; i++)
		for (size_t j = 0; j < batches[i]->count; j++)
			if (!batches[i]->messages[j].settled)
				return batches[i]->messages[j].received_at;
	return 0;
}

static enum spool_result refuse(struct spool *spool, int64_t frames, char *error, size_t error_size)
{
	spool->refused = frames;
	snprintf(error, error_size,
	         "the spool %s is full: %" PRIu64 " messages, %" PRIu64 " of %" PRIu64 " bytes (spool.max_size)%s",
	         spool->path, atomic_load(&spool->messages), atomic_load(&spool->bytes), atomic_load(&spool->max_size),
	         most_bytes(spool) < (int64_t)atomic_load(&spool->max_size) ? ", and the disk has no more" : "");
	return SPOOL_FULL;
}

/* A transaction that went to a file that had moved: nothing of it may be found there when the rows are carried over. */
static void take_back(struct spool *spool)
{
	char error[512];
	sqlite3_bind_int64(spool->statements[REMOVE], 1, spool->next_row);
	sqlite3_bind_int64(spool->statements[REMOVE], 2, INT64_MAX);
	int code = run(spool, BEGIN);
	if (code == SQLITE_OK)
		code = run(spool, REMOVE);
	if (code == SQLITE_OK)
		code = write_tally(spool, (int64_t)atomic_load(&spool->messages), spool->next_row);
	if (code == SQLITE_OK)
		code = run(spool, COMMIT);
	if (code != SQLITE_OK)
		give_up(spool, "write to", code, error, sizeof error); /* the copy ends at next_row all the same */
}

/* The rows of `batches`, numbered from next_row on, in one transaction; *next_row is behind the last then. */
static int write_rows(struct spool *spool, const struct batch *const *batches, size_t count, int64_t messages,
                      int64_t *next_row)
{
	int code = run(spool, BEGIN);
	for (size_t i = 0; code == SQLITE_OK && i < count; i++)
		code = insert_batch(spool, batches[i], next_row);
	if (code == SQLITE_OK)
		code = write_tally(spool, messages, *next_row);
	return code == SQLITE_OK ? run(spool, COMMIT) : code;
}

/* *moved: it was committed, but to a file that is not in place. */
static enum spool_result commit_once(struct spool *spool, const struct batch *const *batches, size_t count, bool *moved,
                                     char *error, size_t error_size)
{
	struct footprint footprint = {0};
	bool fits;
	size_t added = measure(batches, count, &footprint);
	int64_t frames = count_frames(&footprint), next_row = spool->next_row;
	int64_t messages = (int64_t)(atomic_load(&spool->messages) + added);
	int code = find_room(spool, frames, frames, reserve_of(spool), &fits);
	*moved = false;
	if (code == SQLITE_OK && !fits)
		return refuse(spool, frames, error, error_size);
	if (code == SQLITE_OK)
		code = write_rows(spool, batches, count, messages, &next_row);
	if (code != SQLITE_OK) {
		spool->refused = frames;
		return give_up(spool, "write to", code, error, error_size);
	}
	*moved = has_moved(spool);
	if (*moved) {
		take_back(spool);
		return carry_over(spool, error, error_size);
	}
	if (atomic_exchange(&spool->messages, (uint64_t)messages) == 0)
		atomic_store(&spool->oldest_ms, oldest_of(batches, count));
	spool->next_row = next_row;
	return SPOOL_OK;
}

enum spool_result spool_commit(struct spool *spool, const struct batch *const *batches, size_t count, char *error,
                               size_t error_size)
{
	enum { ATTEMPTS = 3 };
	struct footprint footprint = {0};
	bool moved = true;
	if (!is_attached(spool, error, error_size))
		return SPOOL_FAILED;
	if (measure(batches, count, &footprint) == 0)
		return SPOOL_OK;
	enum spool_result result = stay_in_place(spool, error, error_size);
	for (int i = 0; result == SPOOL_OK && moved && i < ATTEMPTS; i++)
		result = commit_once(spool, batches, count, &moved, error, error_size);
	if (result == SPOOL_OK && moved) {
		snprintf(error, error_size, "the spool %s is moved again and again", spool->path);
		result = SPOOL_FAILED;
	}
	if (result != SPOOL_OK)
		return result;
	tidy_wal(spool);
	note_bytes(spool);
	return SPOOL_OK;
}

/* ---- reading ---- */

/* The rows that were found not to be what was written. */
struct damaged_rows {
	int64_t rows[DAMAGED_AT_ONCE];
	size_t count;
};

/* Take rows out of the way. When there is no room for that they stay, and are left out of what is read. */
static enum spool_result set_aside(struct spool *spool, const struct damaged_rows *damaged, char *error,
                                   size_t error_size)
{
	bool fits = false;
	int64_t messages = (int64_t)atomic_load(&spool->messages);
	log_repeat(
	    &spool->damaged_rows, LOG_LEVEL_ERROR, "spool",
	    "%zu messages of %s are not what was written (wrong checksum) and are not delivered; the first is row "
	    "%" PRId64 ", kept in its table damaged",
	    damaged->count, spool->path, damaged->rows[0]);
	int code = find_room(spool, FIXED_FRAMES + (int64_t)damaged->count * 4, 0, 0, &fits);
	if (code == SQLITE_OK && !fits)
		return SPOOL_OK;
	if (code == SQLITE_OK)
		code = run(spool, BEGIN);
	for (size_t i = 0; code == SQLITE_OK && i < damaged->count; i++) {
		sqlite3_bind_int64(spool->statements[SET_ASIDE], 1, damaged->rows[i]);
		code = run(spool, SET_ASIDE);
		sqlite3_bind_int64(spool->statements[REMOVE], 1, damaged->rows[i]);
		sqlite3_bind_int64(spool->statements[REMOVE], 2, damaged->rows[i]);
		if (code == SQLITE_OK)
			code = run(spool, REMOVE);
		messages -= messages > 0;
	}
	if (code == SQLITE_OK)
		code = write_tally(spool, messages, spool->next_row);
	if (code == SQLITE_OK)
		code = run(spool, COMMIT);
	if (code != SQLITE_OK)
		return give_up(spool, "set damaged messages aside in", code, error, error_size) == SPOOL_FULL
		           ? SPOOL_OK
		           : SPOOL_FAILED;
	atomic_store(&spool->messages, (uint64_t)messages);
	code = refresh_oldest(spool);
	return code == SQLITE_OK ? SPOOL_OK : give_up(spool, "read", code, error, error_size);
}

/* Append the row, unless it is of another route than the batch or too much. */
static bool append(struct batch *batch, const struct spool_row *row, size_t most_bytes, size_t *bytes)
{
	size_t size = (size_t)row->record.topic_length + row->record.payload_length;
	const char *route = row->route_length > 0 ? row->route : NULL;
	if (batch->count == 0)
		batch_keep_route(batch, route);
	else if ((route == NULL) != (batch->route == NULL) || (route != NULL && strcmp(route, batch->route) != 0) ||
	         *bytes + size > most_bytes)
		return false;
	struct batch_record record = row->record;
	record.tried = true;
	batch_restore(batch, &record);
	*bytes += size;
	return true;
}

/* SQLITE_OK, or the error that ended it. *seen: how many rows there were, good or not. */
static int read_rows(struct spool *spool, int64_t after, struct batch *batch, size_t most_count, size_t most_bytes,
                     struct damaged_rows *damaged, size_t *seen)
{
	sqlite3_stmt *statement = spool->statements[READ];
	struct spool_row row;
	size_t bytes = 0;
	int code = SQLITE_ROW;
	sqlite3_bind_int64(statement, 1, after);
	while ((batch->count < most_count || batch->count == 0) && damaged->count < DAMAGED_AT_ONCE &&
	       (code = sqlite3_step(statement)) == SQLITE_ROW) {
		++*seen;
		if (!spool_row_take(statement, &row))
			damaged->rows[damaged->count++] = sqlite3_column_int64(statement, 0);
		else if (!append(batch, &row, most_bytes, &bytes))
			break;
	}
	sqlite3_reset(statement);
	return code == SQLITE_ROW || code == SQLITE_DONE ? SQLITE_OK : code;
}

enum spool_result spool_read(struct spool *spool, int64_t after, struct batch *batch, size_t most_count,
                             size_t most_bytes, char *error, size_t error_size)
{
	enum spool_result result = SPOOL_OK;
	bool again;
	if (!is_attached(spool, error, error_size))
		return SPOOL_FAILED;
	do {
		struct damaged_rows damaged = {.count = 0};
		size_t seen = 0;
		int code = read_rows(spool, after, batch, most_count, most_bytes, &damaged, &seen);
		/* There should be some: the tree above the rows is damaged. */
		if (code == SQLITE_OK && seen == 0 && after == 0 && atomic_load(&spool->messages) > 0)
			code = SQLITE_CORRUPT;
		if (code != SQLITE_OK)
			result = give_up(spool, "read", code, error, error_size);
		else if (damaged.count > 0)
			result = set_aside(spool, &damaged, error, error_size);
		again = result == SPOOL_OK && batch->count == 0 && damaged.count == DAMAGED_AT_ONCE;
		if (again)
			after = damaged.rows[damaged.count - 1];
	} while (again);
	if (result != SPOOL_OK)
		batch_reset(batch);
	return result;
}

/* ---- removing ---- */

/* The next run of settled messages from *index on whose rows follow each other, at most `most`. False: none. */
static bool next_range(const struct batch *batch, size_t *index, int64_t most, int64_t *first, int64_t *last)
{
	const struct batch_message *messages = batch->messages;
	while (*index < batch->count && (messages[*index].outcome == BATCH_OPEN || messages[*index].row <= 0))
		++*index;
	if (*index == batch->count)
		return false;
	*first = *last = messages[(*index)++].row;
	for (; *index < batch->count && messages[*index].outcome != BATCH_OPEN && messages[*index].row == *last + 1 &&
	       *last - *first + 1 < most;
	     ++*index)
		++*last;
	return true;
}

/* Delete, from *index on, up to `most` messages in one transaction. */
static int remove_some(struct spool *spool, const struct batch *batch, size_t *index, int64_t most)
{
	int64_t first, last, left = most, messages = (int64_t)atomic_load(&spool->messages);
	int code = run(spool, BEGIN);
	while (code == SQLITE_OK && left > 0 && next_range(batch, index, left, &first, &last)) {
		sqlite3_bind_int64(spool->statements[REMOVE], 1, first);
		sqlite3_bind_int64(spool->statements[REMOVE], 2, last);
		code = run(spool, REMOVE);
		left -= last - first + 1;
		messages -= sqlite3_changes(spool->database);
	}
	messages = largest(messages, 0);
	if (code == SQLITE_OK)
		code = write_tally(spool, messages, spool->next_row);
	if (code == SQLITE_OK)
		code = run(spool, COMMIT);
	if (code == SQLITE_OK)
		atomic_store(&spool->messages, (uint64_t)messages);
	return code;
}

/* Delete a few at a time, each within the reserve. *full: not even that fits, because of a reader beside or a full
 * disk. Above a limit that was lowered since, what the WAL takes for a moment is allowed: there is no other way down.
 */
static int remove_bit_by_bit(struct spool *spool, const struct batch *batch, bool *full)
{
	size_t index = 0;
	bool fits = true;
	int code = SQLITE_OK;
	while (code == SQLITE_OK && fits && index < batch->count) {
		code = find_room(spool, reserve_of(spool) / FRAME_BYTES, 0, 0, &fits);
		fits |= spool->wal_frames == 0;
		if (code == SQLITE_OK && fits)
			code = remove_some(spool, batch, &index, FEW_ROWS);
	}
	*full = !fits;
	return code;
}

enum spool_result spool_remove(struct spool *spool, const struct batch *batch, char *error, size_t error_size)
{
	struct footprint footprint = {0};
	size_t index = 0;
	bool at_once, full = false;
	if (!is_attached(spool, error, error_size))
		return SPOOL_FAILED;
	for (size_t i = 0; i < batch->count; i++) {
		struct spool_row row = spool_row_of(batch, &batch->messages[i], 0);
		add_to_footprint(&footprint, &row);
	}
	int code = find_room(spool, count_frames(&footprint) + footprint.leaves, 0, 0, &at_once);
	if (code == SQLITE_OK)
		code = at_once ? remove_some(spool, batch, &index, INT64_MAX) : remove_bit_by_bit(spool, batch, &full);
	if (code == SQLITE_OK)
		code = refresh_oldest(spool);
	if (code != SQLITE_OK)
		return give_up(spool, "remove from", code, error, error_size);
	if (full)
		return refuse(spool, 0, error, error_size);
	/* What is gone is gone, be the rest carried over now or later; the next commit has to wait for that. */
	if (has_moved(spool) && !spool->stuck)
		carry_over(spool, error, error_size);
	else if (atomic_load(&spool->messages) == 0 && !spool->stuck)
		shrink(spool);
	if (spool->database != NULL)
		tidy_wal(spool);
	note_bytes(spool);
	return SPOOL_OK;
}

/* ---- testing ---- */

/* Whether what was refused last would be taken now; when nothing is left to be removed there is no use in waiting. */
static int has_room(struct spool *spool, bool *fits)
{
	struct statvfs disk;
	int64_t quarter = (int64_t)atomic_load(&spool->max_size) / 4 / FRAME_BYTES;
	int64_t frames = spool->refused > quarter ? quarter : spool->refused;
	int code = SQLITE_OK;
	*fits = true;
	if (frames == 0)
		return SQLITE_OK;
	if (atomic_load(&spool->messages) > 0) /* else spool.max_size leaves as much room as it ever will */
		code = find_room(spool, frames, frames, reserve_of(spool), fits);
	if (*fits && statvfs(spool->directory, &disk) == 0)
		*fits = (int64_t)disk.f_bavail * (int64_t)disk.f_frsize >= frames * FRAME_BYTES;
	return code;
}

enum spool_result spool_test(struct spool *spool, char *error, size_t error_size)
{
	bool fits = true;
	enum spool_result result = spool->database == NULL ? attach(spool, error, error_size) : SPOOL_OK;
	if (result == SPOOL_OK)
		result = stay_in_place(spool, error, error_size);
	if (result != SPOOL_OK)
		return result;
	int code = has_room(spool, &fits);
	if (code == SQLITE_OK && !fits)
		return refuse(spool, spool->refused, error, error_size);
	if (code == SQLITE_OK)
		code = run(spool, TEST);
	if (code != SQLITE_OK)
		return give_up(spool, "write to", code, error, error_size);
	if (has_moved(spool) && (result = carry_over(spool, error, error_size)) != SPOOL_OK)
		return result;
	spool->refused = 0;
	tidy_wal(spool);
	note_bytes(spool);
	return SPOOL_OK;
}

void spool_status(const struct spool *spool, struct spool_status *status)
{
	*status = (struct spool_status){
	    .messages = atomic_load(&spool->messages),
	    .bytes = atomic_load(&spool->bytes),
	    .oldest_ms = atomic_load(&spool->oldest_ms),
	    .max_size = atomic_load(&spool->max_size),
	    .readable = atomic_load(&spool->readable),
	};
}
