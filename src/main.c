/* argv -> configuration -> service -> exit code: 0 well, 1 failed or something missing, 2 configuration. */
#include "build.h"
#include "config.h"
#include "inspect.h"
#include "log.h"
#include "replay.h"
#include "service.h"
#include "spool.h"

#include <malloc.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

extern char **environ;

enum { MAPPED_FROM = 1024 * 1024 };

/*
 * What must be arranged before anything else happens.
 *
 * - Large blocks go back to the system when they are freed. glibc would raise the limit after the first one and keep
 * them in heaps of each thread: a few large payloads, and the service would stay large for ever.
 * - The driver keeps counters in shared memory under the process id. Unnamed, they go with the process however it ends;
 * left behind, they would make the next process of that id complain before our log exists.
 * - What we and our libraries make is for us alone.
 * - Asking for the sums before the service listens must not end it.
 */
static void prepare_process(void)
{
	char counters[32];
	mallopt(M_MMAP_THRESHOLD, MAPPED_FROM);
	snprintf(counters, sizeof counters, "/mongoc-%u", (unsigned)getpid());
	shm_unlink(counters);
	umask(077);
	signal(SIGUSR1, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
}

/*
 * A core dump would hold both passwords and what is on its way, in a file that others may get to see. Not being
 * dumpable keeps it from those too whom a limit does not concern, such as systemd-coredump; and other processes of the
 * same user from reading our memory. This comes before the first secret is read; `limit` is what the limit was.
 */
static void forbid_core_dumps(struct rlimit *limit)
{
	prctl(PR_SET_DUMPABLE, 0);
	getrlimit(RLIMIT_CORE, limit);
	setrlimit(RLIMIT_CORE, &(struct rlimit){.rlim_cur = 0, .rlim_max = limit->rlim_max});
}

/* Whoever asks for them gets as much of them as the system allows. */
static void settle_core_dumps(bool wanted, const struct rlimit *limit)
{
	rlim_t most = wanted ? limit->rlim_max : 0;
	setrlimit(RLIMIT_CORE, &(struct rlimit){.rlim_cur = most, .rlim_max = most});
	if (wanted)
		prctl(PR_SET_DUMPABLE, 1);
}

static int run(const struct config *config)
{
	if (MQTT2MONGO_GATE_OPEN)
		log_warn("service", "THIS BUILD ACKNOWLEDGES BEFORE STORING AND LOSES MESSAGES: it was made with "
		                    "-Dgate=open for tests");
	char error[512];
	struct service *service = service_create(config, error, sizeof error);
	if (service == NULL) {
		log_error("service", "%s", error);
		return 1;
	}
	int exit_code = 1;
	if (service_start_role(service, config->role, error, sizeof error)) {
		exit_code = service_run(service);
	} else {
		log_error("service", "%s", error);
		service_stop(service);
		service_run(service);
	}
	service_destroy(service);
	return exit_code;
}

int main(int argc, char **argv)
{
	struct rlimit core_limit;
	forbid_core_dumps(&core_limit);
	prepare_process();
	struct config config;
	enum config_action action = config_load(&config, argc, argv, environ, stdout, stderr);
	int exit_code = 0;
	settle_core_dumps(config.core_dumps, &core_limit);
	log_configure(config.log_level, config.log_format);
	switch (action) {
	case CONFIG_RUN:
		exit_code = run(&config);
		break;
	case CONFIG_CHECK:
		exit_code = inspect_check(&config);
		break;
	case CONFIG_DRY_RUN:
		exit_code = inspect_dry_run(&config);
		break;
	case CONFIG_SPOOL_STATUS:
		exit_code = spool_print_status(&config.spool, config.log_format == LOG_FORMAT_JSON);
		break;
	case CONFIG_SPOOL_EXPORT:
		exit_code = spool_export(&config.spool);
		break;
	case CONFIG_REPLAY:
		exit_code = replay_dead_letters(&config);
		break;
	case CONFIG_PRINTED:
		break;
	case CONFIG_INVALID:
		exit_code = 2;
		break;
	}
	config_finish(&config);
	return exit_code;
}
