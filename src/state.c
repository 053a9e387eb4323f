/*
 * See state.h. state.json:
 *
 *   { "client_id": "mqtt2mongo-1a2b3c4d", "sessions": { "mqtt2mongo-1a2b3c4d-1": ["sensors/#"] } }
 */
#define _GNU_SOURCE
#include "state.h"

#include "directory.h"
#include "log.h"
#include "memory.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MOST_BYTES = 4 * 1024 * 1024, ROLES = 2 };

#define STATE_FILE     "state.json"
#define TEMPORARY_FILE "state.json.tmp"
#define LOCK_FILE      "state.lock" /* held while the file is written */

struct state {
	char *directory; /* without symbolic links */
	char *path;      /* for people; files are opened in the directory */
	cJSON *tree;
	cJSON *own;   /* names the sessions this process has changed; all others are as whoever wrote them last */
	bool changed; /* since it was read or saved */
	struct {
		char name[16];
		int fd;
	} locks[ROLES];
	size_t lock_count;
};

/* Open a file of the directory, which is looked for each time: it may have been moved. */
static int open_file(const struct state *state, const char *name, int flags)
{
	int directory = directory_open(state->directory);
	if (directory < 0)
		return -1;
	int fd = directory_open_file(directory, name, flags);
	int reason = errno;
	close(directory);
	errno = reason;
	return fd;
}

/* The text of the state file, or NULL with errno. */
static char *read_file(const struct state *state)
{
	int fd = open_file(state, STATE_FILE, O_RDONLY);
	if (fd < 0)
		return NULL;
	char *text = memory_zeroed(1, MOST_BYTES + 1);
	size_t length = 0;
	ssize_t got;
	while ((got = read(fd, text + length, MOST_BYTES - length)) > 0)
		length += (size_t)got;
	int reason = errno;
	close(fd);
	if (got == 0)
		return text;
	free(text);
	errno = reason;
	return NULL;
}

static void set_aside(const struct state *state)
{
	char *aside = memory_format("%s.corrupt-%lld", state->path, (long long)time(NULL));
	int renamed = rename(state->path, aside);
	log_warn("state",
	         "%s is damaged%s%s; starting with an empty one. A filter subscribed earlier and no longer configured "
	         "will not be unsubscribed",
	         state->path, renamed == 0 ? ", set aside as " : "", renamed == 0 ? aside : "");
	free(aside);
}

/* False with errno when there is a file that cannot be read: then no new identity may replace it. */
static bool load(struct state *state)
{
	char *text = read_file(state);
	if (text == NULL && errno != ENOENT)
		return false;
	if (text != NULL) {
		state->tree = cJSON_Parse(text);
		free(text);
		if (!cJSON_IsObject(state->tree)) {
			cJSON_Delete(state->tree);
			state->tree = NULL;
			set_aside(state);
		}
	}
	if (state->tree == NULL)
		state->tree = cJSON_CreateObject();
	return true;
}

struct state *state_open(const char *directory, char *error, size_t error_size)
{
	char reason[512];
	bool refused;
	char *settled = directory_settle(directory, true, &refused, reason, sizeof reason);
	if (settled != NULL && faccessat(AT_FDCWD, settled, W_OK | X_OK, AT_EACCESS) != 0) {
		snprintf(reason, sizeof reason, "%s", strerror(errno));
		free(settled);
		settled = NULL;
	}
	if (settled == NULL) {
		snprintf(error, error_size, "cannot %s the state directory %s: %s; %schoose another with state_dir",
		         refused ? "use" : "write to", directory, reason, refused ? "or " : "");
		return NULL;
	}
	struct state *state = memory_zeroed(1, sizeof *state);
	state->directory = settled;
	state->path = memory_format("%s/" STATE_FILE, directory);
	if (load(state))
		return state;
	snprintf(error, error_size, "cannot read %s: %s; it names this service's session at the broker", state->path,
	         strerror(errno));
	state_close(state);
	return NULL;
}

void state_close(struct state *state)
{
	if (state == NULL)
		return;
	for (size_t i = 0; i < state->lock_count; i++)
		close(state->locks[i].fd);
	cJSON_Delete(state->tree);
	free(state->directory);
	free(state->path);
	cJSON_Delete(state->own);
	free(state);
}

/* The process that wrote its number into a lock file, or 0. */
static long lock_holder(int fd)
{
	char text[32] = "";
	ssize_t got = pread(fd, text, sizeof text - 1, 0);
	return got > 0 ? strtol(text, NULL, 10) : 0;
}

bool state_lock(struct state *state, const char *role, char *error, size_t error_size)
{
	char *name = memory_format("%s.lock", role);
	int fd = open_file(state, name, O_RDWR | O_CREAT);
	if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB) != 0) {
		if (fd >= 0 && errno == EWOULDBLOCK)
			snprintf(error, error_size,
			         "another mqtt2mongo (process %ld) runs as %s with the state directory %s; two would "
			         "take the session from each other: give this one its own state_dir",
			         lock_holder(fd), role, state->directory);
		else
			snprintf(error, error_size, "cannot lock %s/%s: %s", state->directory, name, strerror(errno));
		if (fd >= 0)
			close(fd);
		free(name);
		return false;
	}
	free(name);
	if (ftruncate(fd, 0) == 0)
		dprintf(fd, "%ld\n", (long)getpid());
	snprintf(state->locks[state->lock_count].name, sizeof state->locks->name, "%s", role);
	state->locks[state->lock_count++].fd = fd;
	return true;
}

void state_unlock(struct state *state, const char *role)
{
	for (size_t i = 0; i < state->lock_count; i++) {
		if (strcmp(state->locks[i].name, role) != 0)
			continue;
		close(state->locks[i].fd);
		state->locks[i] = state->locks[--state->lock_count];
		return;
	}
}

const char *state_client_id(struct state *state, const char *configured)
{
	if (configured != NULL)
		return configured;
	cJSON *known = cJSON_GetObjectItemCaseSensitive(state->tree, "client_id");
	if (cJSON_IsString(known) && known->valuestring[0] != 0)
		return known->valuestring;
	unsigned random = 0;
	if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random)
		random = (unsigned)getpid() ^ (unsigned)time(NULL);
	char made[32];
	snprintf(made, sizeof made, "mqtt2mongo-%08x", random);
	state->changed = true;
	cJSON_DeleteItemFromObjectCaseSensitive(state->tree, "client_id");
	return cJSON_AddStringToObject(state->tree, "client_id", made)->valuestring;
}

static cJSON *filters_of(const struct state *state, const char *client_id)
{
	cJSON *sessions = cJSON_GetObjectItemCaseSensitive(state->tree, "sessions");
	return cJSON_GetObjectItemCaseSensitive(sessions, client_id);
}

const char *state_filter(const struct state *state, const char *client_id, size_t index)
{
	return cJSON_GetStringValue(cJSON_GetArrayItem(filters_of(state, client_id), (int)index));
}

static int find_filter(const cJSON *filters, const char *filter)
{
	int index = 0;
	const cJSON *item;
	cJSON_ArrayForEach (item, filters) {
		if (cJSON_IsString(item) && strcmp(item->valuestring, filter) == 0)
			return index;
		index++;
	}
	return -1;
}

static cJSON *child_of(cJSON *parent, const char *name, bool array)
{
	cJSON *child = cJSON_GetObjectItemCaseSensitive(parent, name);
	if (child != NULL && (array ? cJSON_IsArray(child) : cJSON_IsObject(child)))
		return child;
	cJSON_DeleteItemFromObjectCaseSensitive(parent, name);
	return array ? cJSON_AddArrayToObject(parent, name) : cJSON_AddObjectToObject(parent, name);
}

static void own_session(struct state *state, const char *client_id)
{
	state->changed = true;
	if (state->own == NULL)
		state->own = cJSON_CreateObject();
	if (cJSON_GetObjectItemCaseSensitive(state->own, client_id) == NULL)
		cJSON_AddTrueToObject(state->own, client_id);
}

static bool is_own(const struct state *state, const char *client_id)
{
	return cJSON_GetObjectItemCaseSensitive(state->own, client_id) != NULL;
}

void state_add_filter(struct state *state, const char *client_id, const char *filter)
{
	cJSON *filters = child_of(child_of(state->tree, "sessions", false), client_id, true);
	if (find_filter(filters, filter) >= 0)
		return;
	own_session(state, client_id);
	cJSON_AddItemToArray(filters, cJSON_CreateString(filter));
}

void state_remove_filter(struct state *state, const char *client_id, const char *filter)
{
	cJSON *filters = filters_of(state, client_id);
	int index = find_filter(filters, filter);
	if (index < 0)
		return;
	own_session(state, client_id);
	cJSON_DeleteItemFromArray(filters, index);
}

const char *state_session(const struct state *state, size_t index)
{
	const cJSON *sessions = cJSON_GetObjectItemCaseSensitive(state->tree, "sessions");
	const cJSON *session = cJSON_GetArrayItem(sessions, (int)index);
	return session != NULL ? session->string : NULL;
}

void state_remove_session(struct state *state, const char *client_id)
{
	cJSON *sessions = cJSON_GetObjectItemCaseSensitive(state->tree, "sessions");
	if (cJSON_GetObjectItemCaseSensitive(sessions, client_id) == NULL)
		return;
	own_session(state, client_id);
	cJSON_DeleteItemFromObjectCaseSensitive(sessions, client_id);
}

static bool write_durably(int fd, const char *text)
{
	size_t length = strlen(text);
	while (length > 0) {
		ssize_t written = write(fd, text, length);
		if (written < 0)
			return false;
		text += written;
		length -= (size_t)written;
	}
	return fsync(fd) == 0;
}

/* Replace a member of `target` by a copy of the one in `source`, if there is one. */
static void take_over(cJSON *target, const cJSON *source, const char *name)
{
	cJSON *item = cJSON_GetObjectItemCaseSensitive(source, name);
	if (item == NULL)
		return;
	cJSON_DeleteItemFromObjectCaseSensitive(target, name);
	cJSON_AddItemToObject(target, name, cJSON_Duplicate(item, true));
}

/* Another process of this directory, the publisher beside the consumer, may have saved since we read: its client id and
 * its sessions stand, ours are as we have them. */
static void merge_saved(struct state *state)
{
	char *text = read_file(state);
	cJSON *saved = text != NULL ? cJSON_Parse(text) : NULL;
	cJSON *sessions = child_of(state->tree, "sessions", false);
	const cJSON *session;
	if (cJSON_IsObject(saved)) {
		take_over(state->tree, saved, "client_id");
		const cJSON *theirs = child_of(saved, "sessions", false);
		cJSON_ArrayForEach (session, theirs) {
			if (!is_own(state, session->string))
				take_over(sessions, theirs, session->string);
		}
	}
	cJSON_Delete(saved);
	free(text);
}

/* What a crash has left of the temporary file goes; then it must be a new one. */
static bool replace_file(struct state *state, int directory)
{
	char *text = cJSON_Print(state->tree);
	unlinkat(directory, TEMPORARY_FILE, 0);
	int fd = directory_open_file(directory, TEMPORARY_FILE, O_WRONLY | O_CREAT | O_EXCL);
	bool written = text != NULL && fd >= 0 && write_durably(fd, text);
	int reason = errno;
	if (fd >= 0)
		close(fd);
	cJSON_free(text);
	errno = reason;
	return written && renameat(directory, TEMPORARY_FILE, directory, STATE_FILE) == 0 && fsync(directory) == 0;
}

bool state_save(struct state *state, char *error, size_t error_size)
{
	if (!state->changed)
		return true;
	int directory = directory_open(state->directory);
	int lock = directory >= 0 ? directory_open_file(directory, LOCK_FILE, O_RDWR | O_CREAT) : -1;
	bool saved = lock >= 0 && flock(lock, LOCK_EX) == 0;
	if (saved) {
		merge_saved(state);
		saved = replace_file(state, directory);
	}
	if (saved)
		state->changed = false;
	else
		snprintf(error, error_size, "cannot write %s: %s", state->path, strerror(errno));
	if (lock >= 0)
		close(lock);
	if (directory >= 0)
		close(directory);
	return saved;
}
