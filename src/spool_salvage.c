/*
 * See spool_row.h. Reads what SQLite's own reader gives up on, from the format as its documentation has it
 * (sqlite.org/fileformat2.html): every page that looks like a leaf of a table is searched for cells that look like a
 * row of ours, and the row's checksum tells whether it is one. Nothing of what a page says is believed before that.
 *
 * Long rows go on in overflow pages, found by their number: in the newest frame of the WAL that holds that page, else
 * in the file.
 */
#define _GNU_SOURCE
#include "spool_row.h"

#include "memory.h"

#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	LEAF = 0x0d, /* first byte of a leaf page of a table */
	LEAF_HEADER = 8,
	LONGEST_ROW = 64 * 1024 * 1024,
	LOCAL_MOST = SPOOL_PAGE - 35,                         /* a row up to this lies in its leaf whole */
	LOCAL_LEAST = (SPOOL_PAGE - 12) * 32 / 255 - 23,      /* else this much of it, or somewhat more */
	OVERFLOW_BYTES = SPOOL_PAGE - 4,                      /* in an overflow page, behind the next one's number */
	FRAME_BYTES = (int)SPOOL_WAL_FRAME + (int)SPOOL_PAGE, /* of the WAL */
};

struct search {
	const struct spool_salvage *salvage;
	uint32_t *frame_of; /* page number -> frame + 1 of the WAL, or 0 */
	size_t frame_pages; /* how many entries */
	struct buffer bytes;
	bool (*found)(void *owner, const struct spool_row *row);
	void *owner;
};

static uint32_t big16(const uint8_t *at)
{
	return (uint32_t)at[0] << 8 | at[1];
}

static uint32_t big32(const uint8_t *at)
{
	return big16(at) << 16 | big16(at + 2);
}

/* The bytes it took, or 0 when it does not end before `end`. */
static size_t take_varint(const uint8_t *at, const uint8_t *end, uint64_t *value)
{
	*value = 0;
	for (size_t i = 0; i < 9 && at + i < end; i++) {
		*value = i == 8 ? *value << 8 | at[i] : *value << 7 | (at[i] & 0x7f);
		if (i == 8 || at[i] < 0x80)
			return i + 1;
	}
	return 0;
}

static size_t count_frames(size_t wal_bytes)
{
	return wal_bytes > SPOOL_WAL_HEADER ? (wal_bytes - SPOOL_WAL_HEADER) / FRAME_BYTES : 0;
}

static const uint8_t *frame_at(const uint8_t *wal, size_t frame)
{
	return wal + SPOOL_WAL_HEADER + frame * FRAME_BYTES;
}

/* Of the generation that the WAL's header names, not left over from one before. */
static bool is_current(const uint8_t *wal, const uint8_t *frame)
{
	return memcmp(frame + 8, wal + 16, 8) == 0;
}

bool spool_salvage_has_tail(const uint8_t *wal, size_t wal_bytes, size_t frames)
{
	size_t count = count_frames(wal_bytes);
	for (size_t i = frames; i < count; i++) {
		const uint8_t *frame = frame_at(wal, i);
		if (is_current(wal, frame) && big32(frame + 4) != 0)
			return true;
	}
	return false;
}

/* ---- columns ---- */

struct column {
	bool is_null;
	int64_t number;
	const uint8_t *bytes; /* NULL for a number */
	size_t length;
};

static int64_t take_integer(const uint8_t *at, size_t length)
{
	uint64_t value = length > 0 && at[0] >= 0x80 ? UINT64_MAX : 0;
	for (size_t i = 0; i < length; i++)
		value = value << 8 | at[i];
	return (int64_t)value;
}

/* One value of that serial type. False when it is no type we write or does not fit. */
static bool take_column(uint64_t type, const uint8_t **at, const uint8_t *end, struct column *column)
{
	static const size_t integer_sizes[] = {0, 1, 2, 3, 4, 6, 8};
	*column = (struct column){.is_null = type == 0};
	size_t size = 0;
	if (type >= 1 && type <= 6)
		size = integer_sizes[type];
	else if (type >= 12 && (type - 12) / 2 <= LONGEST_ROW)
		size = column->length = (size_t)(type - 12) / 2;
	else if (type == 8 || type == 9)
		column->number = (int64_t)type - 8;
	else if (type != 0)
		return false;
	if ((size_t)(end - *at) < size)
		return false;
	if (type >= 12)
		column->bytes = *at;
	else if (size > 0)
		column->number = take_integer(*at, size);
	*at += size;
	return true;
}

static bool take_columns(const uint8_t *bytes, size_t length, struct column *columns)
{
	if (length == 0) /* and maybe nowhere: no offset may be added to NULL, not even 0 */
		return false;
	const uint8_t *at = bytes, *end = bytes + length, *values;
	uint64_t header, type;
	size_t step = take_varint(at, end, &header);
	if (step == 0 || header > length)
		return false;
	values = bytes + header;
	at += step;
	for (int i = 0; i < SPOOL_COLUMNS; i++) {
		step = take_varint(at, bytes + header, &type);
		if (step == 0 || !take_column(type, &values, end, &columns[i]))
			return false;
		at += step;
	}
	return at == bytes + header && values == end;
}

/* The columns in the order of SPOOL_COLUMN_NAMES; the first, the row's number, is kept in the cell instead. */
static bool make_row(const struct column *columns, int64_t number, struct spool_row *row)
{
	const struct column *id = &columns[1], *route = &columns[2], *topic = &columns[3], *payload = &columns[4],
			    *digest = &columns[9], *properties = &columns[10];
	if (id->bytes == NULL || id->length != sizeof row->record.id.bytes || route->bytes == NULL ||
	    topic->bytes == NULL || payload->bytes == NULL ||
	    (!digest->is_null && (digest->bytes == NULL || digest->length != BATCH_DIGEST_BYTES)))
		return false;
	*row = (struct spool_row){
	    .record = {.topic = (const char *)topic->bytes,
	               .topic_length = (uint32_t)topic->length,
	               .payload = payload->bytes,
	               .payload_length = (uint32_t)payload->length,
	               .received_at = columns[5].number,
	               .qos = (uint8_t)columns[6].number,
	               .full_length = (uint32_t)columns[8].number,
	               .digest = digest->bytes,
	               .properties = properties->bytes,
	               .properties_length = (uint32_t)properties->length,
	               .row = number},
	    .route = (const char *)route->bytes,
	    .route_length = route->length,
	    .properties = properties->bytes,
	    .properties_length = properties->length,
	};
	memcpy(row->record.id.bytes, id->bytes, id->length);
	spool_row_set_flags(&row->record, columns[7].number);
	return spool_row_checksum(row) == (uint64_t)columns[11].number;
}

/* ---- cells ---- */

static bool read_page(const struct search *search, uint32_t number, uint8_t *page)
{
	if (number < search->frame_pages && search->frame_of[number] != 0) {
		memcpy(page, frame_at(search->salvage->wal, search->frame_of[number] - 1) + SPOOL_WAL_FRAME,
		       SPOOL_PAGE);
		return true;
	}
	return search->salvage->file >= 0 && number > 0 &&
	       pread(search->salvage->file, page, SPOOL_PAGE, (off_t)(number - 1) * SPOOL_PAGE) == SPOOL_PAGE;
}

/* How much of a row of that length lies in its leaf. */
static size_t local_length(uint64_t length)
{
	if (length <= LOCAL_MOST)
		return (size_t)length;
	size_t local = LOCAL_LEAST + (size_t)(length - LOCAL_LEAST) % OVERFLOW_BYTES;
	return local <= LOCAL_MOST ? local : LOCAL_LEAST;
}

/* Append the rest of a row, of which `left` bytes are missing, from the chain that starts at page `number`. */
static bool read_chain(struct search *search, uint32_t number, size_t left)
{
	uint8_t page[SPOOL_PAGE];
	while (left > 0) {
		if (!read_page(search, number, page))
			return false;
		size_t part = left < OVERFLOW_BYTES ? left : OVERFLOW_BYTES;
		buffer_append(&search->bytes, page + 4, part);
		left -= part;
		number = big32(page);
	}
	return true;
}

static bool search_cell(struct search *search, const uint8_t *page, size_t offset)
{
	const uint8_t *at = page + offset, *end = page + SPOOL_PAGE;
	uint64_t length, number;
	size_t step = take_varint(at, end, &length);
	at += step;
	if (step == 0 || length > LONGEST_ROW || (step = take_varint(at, end, &number)) == 0)
		return true;
	at += step;
	size_t local = local_length(length);
	bool spills = local < length;
	if ((size_t)(end - at) < local + (spills ? 4 : 0) || (int64_t)number < search->salvage->least_row)
		return true;
	buffer_reset(&search->bytes, LONGEST_ROW);
	buffer_append(&search->bytes, at, local);
	if (spills && !read_chain(search, big32(at + local), (size_t)length - local))
		return true;
	struct column columns[SPOOL_COLUMNS];
	struct spool_row row;
	if (!take_columns(search->bytes.data, search->bytes.length, columns) ||
	    !make_row(columns, (int64_t)number, &row))
		return true;
	return search->found(search->owner, &row);
}

static bool search_page(struct search *search, const uint8_t *page)
{
	if (page[0] != LEAF)
		return true;
	size_t cells = big16(page + 3);
	bool going_on = true;
	/* A number of cells that cannot be: look at what could be pointers to cells. */
	if (cells > (SPOOL_PAGE - LEAF_HEADER) / 2)
		cells = (SPOOL_PAGE - LEAF_HEADER) / 2;
	for (size_t i = 0; going_on && i < cells; i++) {
		size_t offset = big16(page + LEAF_HEADER + 2 * i);
		if (offset >= LEAF_HEADER && offset < SPOOL_PAGE)
			going_on = search_cell(search, page, offset);
	}
	return going_on;
}

static bool search_wal(struct search *search)
{
	const uint8_t *wal = search->salvage->wal;
	size_t count = wal != NULL ? count_frames(search->salvage->wal_bytes) : 0;
	bool going_on = true;
	for (size_t i = search->salvage->first_frame; going_on && i < count; i++)
		if (is_current(wal, frame_at(wal, i)))
			going_on = search_page(search, frame_at(wal, i) + SPOOL_WAL_FRAME);
	return going_on;
}

static bool search_file(struct search *search)
{
	uint8_t page[SPOOL_PAGE];
	bool going_on = true;
	struct stat status;
	if (search->salvage->file < 0 || fstat(search->salvage->file, &status) != 0)
		return true;
	for (off_t at = 0; going_on && at < status.st_size; at += SPOOL_PAGE) {
		ssize_t got = pread(search->salvage->file, page, sizeof page, at);
		/* A page cut off by the file's end, or one the disk cannot read: zeros where there is nothing. */
		if (got < 0)
			got = 0;
		memset(page + got, 0, sizeof page - (size_t)got);
		going_on = search_page(search, page);
	}
	return going_on;
}

/* Where in the WAL each page was written last. */
static void index_wal(struct search *search)
{
	const struct spool_salvage *salvage = search->salvage;
	size_t count = salvage->wal != NULL ? count_frames(salvage->wal_bytes) : 0;
	enum { PAGES_MOST = 16 * 1024 * 1024 }; /* a damaged number is not worth gigabytes */
	for (size_t i = 0; i < count; i++) {
		uint32_t number = big32(frame_at(salvage->wal, i));
		if (is_current(salvage->wal, frame_at(salvage->wal, i)) && number < PAGES_MOST &&
		    number >= search->frame_pages)
			search->frame_pages = (size_t)number + 1;
	}
	search->frame_of = memory_zeroed(search->frame_pages + 1, sizeof *search->frame_of);
	for (size_t i = 0; i < count; i++) {
		uint32_t number = big32(frame_at(salvage->wal, i));
		if (is_current(salvage->wal, frame_at(salvage->wal, i)) && number < search->frame_pages)
			search->frame_of[number] = (uint32_t)i + 1;
	}
}

bool spool_salvage(const struct spool_salvage *salvage, bool (*found)(void *owner, const struct spool_row *row),
                   void *owner)
{
	struct search search = {.salvage = salvage, .found = found, .owner = owner};
	index_wal(&search);
	bool whole = search_file(&search) && search_wal(&search);
	buffer_finish(&search.bytes);
	free(search.frame_of);
	return whole;
}
