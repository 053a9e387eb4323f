/* mqtt.c without a broker: a connection is ended at every moment of an attempt. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "mqtt.h"

#include <arpa/inet.h>
#include <mosquitto.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

struct attempt {
	uv_check_t check;
	struct mqtt *mqtt;
	int turns; /* of the loop, until it is ended */
	int closed;
};

/* An attempt has failed: the next one, so that the loop never waits for nothing. */
static void on_down(void *owner)
{
	mqtt_connect(((struct attempt *)owner)->mqtt);
}

static void on_closed(void *owner)
{
	struct attempt *attempt = owner;
	attempt->closed++;
	mqtt_free(attempt->mqtt);
}

/* After the poll phase of a turn, before handles that were closed in it are given back. */
static void end_it(uv_check_t *check)
{
	struct attempt *attempt = (struct attempt *)check;
	if (attempt->turns-- > 0)
		return;
	mqtt_close(attempt->mqtt, on_closed);
	uv_close((uv_handle_t *)check, NULL);
}

/* Takes connections and says nothing. */
static int silent_listener(int *port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t size = sizeof address;
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	assert_true(fd >= 0);
	assert_int_equal(bind(fd, (struct sockaddr *)&address, size), 0);
	assert_int_equal(listen(fd, 64), 0);
	assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &size), 0);
	*port = ntohs(address.sin_port);
	return fd;
}

/* A probe's handle is given back while the connect job already runs in a worker: the job's client must stay. */
static void closing_waits_for_the_connect_job(void **state)
{
	int port;
	int listener = silent_listener(&port);
	char host[] = "127.0.0.1";
	struct config_mqtt config = {.host = host,
	                             .port = port,
	                             .protocol = 5,
	                             .keepalive_ms = 60000,
	                             .connect_timeout_ms = 50,
	                             .session_expiry_ms = 60000,
	                             .receive_maximum = 100,
	                             .reconnect_min_ms = 1,
	                             .reconnect_max_ms = 1};
	for (int turns = 0; turns < 12; turns++) {
		uv_loop_t loop;
		struct attempt attempt = {.turns = turns};
		struct mqtt_handler handler = {.down = on_down};
		struct mqtt_options options = {.config = &config, .client_id = "id", .name = "test", .quiet = true};
		uv_loop_init(&loop);
		uv_check_init(&loop, &attempt.check);
		uv_check_start(&attempt.check, end_it);
		attempt.mqtt = mqtt_create(&loop, &options, &handler, &attempt);
		mqtt_connect(attempt.mqtt);
		uv_run(&loop, UV_RUN_DEFAULT);
		assert_int_equal(attempt.closed, 1);
		assert_int_equal(uv_loop_close(&loop), 0);
	}
	close(listener);
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(closing_waits_for_the_connect_job)};
	mosquitto_lib_init();
	int failed = cmocka_run_group_tests(tests, NULL, NULL);
	mosquitto_lib_cleanup();
	return failed;
}
