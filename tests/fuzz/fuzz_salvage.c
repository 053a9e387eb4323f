/*
 * libFuzzer target for spool_salvage(): whatever bytes a damaged spool has, nothing is read beyond them. The first byte
 * says whether the others are the file or its log. Each row that is found is read whole.
 *
 * Run: fuzz_salvage -max_len=20000 a-folder-for-finds tests/fuzz/corpus/salvage
 */
#define _GNU_SOURCE
#include "spool_row.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static bool found(void *owner, const struct spool_row *row)
{
	uint64_t *sum = owner;
	*sum += spool_row_checksum(row);
	return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct spool_salvage salvage = {.file = -1};
	uint64_t sum = 0;
	if (size == 0)
		return 0;
	/* In a block of its own size, so that AddressSanitizer sees a byte read too far. */
	uint8_t *bytes = malloc(size);
	memcpy(bytes, data + 1, size - 1);
	if (data[0] & 1) {
		bytes = realloc(bytes, size > 1 ? size - 1 : 1);
		salvage.wal = bytes;
		salvage.wal_bytes = size - 1;
	} else {
		salvage.file = memfd_create("spool", MFD_CLOEXEC);
		if (salvage.file < 0 || write(salvage.file, bytes, size - 1) != (ssize_t)size - 1)
			abort();
	}
	spool_salvage(&salvage, found, &sum);
	if (salvage.wal != NULL)
		spool_salvage_has_tail(salvage.wal, salvage.wal_bytes, 0);
	if (salvage.file >= 0)
		close(salvage.file);
	free(bytes);
	return 0;
}
