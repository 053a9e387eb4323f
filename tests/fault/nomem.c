/*
 * LD_PRELOAD for the fault tests: while the file FAULT_NOMEM_CONTROL exists, the function that it names finds no
 * memory: mosquitto_property_add_int32(), mosquitto_unsubscribe_v5() or EVP_Digest(). Each failure appends a line to
 * FAULT_NOMEM_LOG: the proof that the fault happened.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <mosquitto.h>
#include <openssl/evp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool fails(const char *name)
{
	const char *control = getenv("FAULT_NOMEM_CONTROL"), *log = getenv("FAULT_NOMEM_LOG");
	char wanted[64];
	int file = control != NULL ? open(control, O_RDONLY | O_CLOEXEC) : -1;
	ssize_t length = file >= 0 ? read(file, wanted, sizeof wanted) : -1;
	if (file >= 0)
		close(file);
	if (log == NULL || length != (ssize_t)strlen(name) || memcmp(wanted, name, strlen(name)) != 0)
		return false;
	file = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (write(file, "failed\n", 7) < 0)
		perror(log);
	close(file);
	return true;
}

static void *real(const char *name)
{
	return dlsym(RTLD_NEXT, name);
}

int mosquitto_property_add_int32(mosquitto_property **list, int identifier, uint32_t value)
{
	union { /* ISO C knows no cast from an object's pointer to a function's */
		void *object;
		int (*function)(mosquitto_property **, int, uint32_t);
	} next = {.object = real(__func__)};
	return fails(__func__) ? MOSQ_ERR_NOMEM : next.function(list, identifier, value);
}

// NOLINTNEXTLINE(readability-inconsistent-declaration-parameter-name)
int mosquitto_unsubscribe_v5(struct mosquitto *client, int *id, const char *filter,
                             const mosquitto_property *properties)
{
	union {
		void *object;
		int (*function)(struct mosquitto *, int *, const char *, const mosquitto_property *);
	} next = {.object = real(__func__)};
	return fails(__func__) ? MOSQ_ERR_NOMEM : next.function(client, id, filter, properties);
}

// NOLINTNEXTLINE(readability-inconsistent-declaration-parameter-name)
int EVP_Digest(const void *data, size_t count, unsigned char *digest, unsigned int *size, const EVP_MD *type,
               ENGINE *engine)
{
	union {
		void *object;
		int (*function)(const void *, size_t, unsigned char *, unsigned int *, const EVP_MD *, ENGINE *);
	} next = {.object = real(__func__)};
	return fails(__func__) ? 0 : next.function(data, count, digest, size, type, engine);
}
