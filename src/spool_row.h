/*
 * What the spool*.c files share, and nobody else includes: how the spool's SQLite file is laid out, and one row of it.
 *
 *   spool.c          the handle of the service: commit, read, remove, test
 *   spool_row.c      a message as a row: its columns, its checksum, to a statement and from one
 *   spool_salvage.c  rows out of the raw pages of a damaged file
 *   spool_print.c    --spool-status and --spool-export
 *
 * SQLite notices damage to its structure, not to what is stored in it; so each row carries a checksum over all of its
 * columns, and a row whose checksum is wrong is never taken for a message.
 */
#ifndef MQTT2MONGO_SPOOL_ROW_H
#define MQTT2MONGO_SPOOL_ROW_H

#include "batch.h"

#include <sqlite3.h>

enum {
	SPOOL_APPLICATION = 0x6d326d53, /* "m2mS", SQLite's application_id */
	SPOOL_FORMAT = 1,               /* its user_version: raised when an older program could not read the file */
	SPOOL_PAGE = 4096,              /* bytes */
	SPOOL_WAL_HEADER = 32,
	SPOOL_WAL_FRAME = 24, /* before each page of the WAL */
	SPOOL_COLUMNS = 12,
};

#define SPOOL_COLUMN_NAMES                                                                                             \
	"row, id, route, topic, payload, received_at, qos, flags, full_length, digest, properties, checksum"
#define SPOOL_COLUMN_TYPES                                                                                             \
	"row INTEGER PRIMARY KEY, id BLOB, route TEXT, topic BLOB, payload BLOB, received_at INTEGER, qos INTEGER, "   \
	"flags INTEGER, full_length INTEGER, digest BLOB, properties BLOB, checksum INTEGER"

/* A message and where it is going. Borrows all bytes. */
struct spool_row {
	struct batch_record record;
	const char *route; /* NUL-terminated unless it comes from spool_salvage() */
	size_t route_length;
	const void *properties; /* or NULL */
	size_t properties_length;
};

/* The row of a message of a batch, numbered `row`. */
struct spool_row spool_row_of(const struct batch *batch, const struct batch_message *message, int64_t row);

/* Over every column, the row's number included: a row that strayed to another place is wrong too. */
uint64_t spool_row_checksum(const struct spool_row *row);

/* The bytes of the columns that have no fixed size. */
size_t spool_row_bytes(const struct spool_row *row);

/* retain, dup and tried in one number, and back. */
int spool_row_flags(const struct batch_record *record);
void spool_row_set_flags(struct batch_record *record, int64_t flags);

/* Bind all columns in the order of SPOOL_COLUMN_NAMES, borrowing the bytes until the statement is reset. */
void spool_row_bind(sqlite3_stmt *statement, const struct spool_row *row);

/* Take the columns of the row that `statement` stands on; valid until it steps. False: they are not what was written.
 */
bool spool_row_take(sqlite3_stmt *statement, struct spool_row *row);

/* What of a damaged spool spool_salvage() looks through. */
struct spool_salvage {
	int file;           /* the database, or -1 */
	const uint8_t *wal; /* its write-ahead log, whole, or NULL */
	size_t wal_bytes;
	size_t first_frame; /* of the WAL, from 0; frames before it are only looked up, not searched */
	int64_t least_row;
};

/*
 * Call `found` with each row from `least_row` on whose checksum is right, wherever it lies: in any page of the file or
 * of the WAL, whatever the pages above it say. So a row may be found several times, and one that was deleted may still
 * be found. False when `found` returned false, which ends the search.
 */
bool spool_salvage(const struct spool_salvage *salvage, bool (*found)(void *owner, const struct spool_row *row),
                   void *owner);

/* True when, behind its first `frames` frames, the WAL holds the end of a transaction of the same generation. */
bool spool_salvage_has_tail(const uint8_t *wal, size_t wal_bytes, size_t frames);

#endif
