/* Which Host is ours: the table of what a browser, a monitor and a stranger send. */
#include "http.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static const char *const NAMES[] = {"status.example.org", "Plant7.", "xn--bcher-kva.example"};

static void hosts_that_are_known(void **state)
{
	static const char *const KNOWN[] = {"127.0.0.1",
	                                    "127.0.0.1:9641",
	                                    "192.168.1.20:80",
	                                    "0.0.0.0",
	                                    "[::1]",
	                                    "[::1]:9641",
	                                    "[2001:db8::7]:1",
	                                    "[::ffff:127.0.0.1]:9641",
	                                    "127.0.0.1.",
	                                    "localhost",
	                                    "localhost:9641",
	                                    "LOCALHOST:9641",
	                                    "localhost.",
	                                    "localhost.:9641",
	                                    "a.localhost",
	                                    "A.b.LocalHost.:1",
	                                    "raspberrypi.local",
	                                    "RaspberryPi.Local.:9641",
	                                    "status.example.org",
	                                    "STATUS.example.ORG.:9641",
	                                    "plant7",
	                                    "PLANT7.",
	                                    "plant7:1",
	                                    "xn--bcher-kva.example",
	                                    "localhost:",
	                                    NULL};
	for (size_t i = 0; i < sizeof KNOWN / sizeof KNOWN[0]; i++)
		if (!http_knows_host(KNOWN[i], NAMES, 3))
			fail_msg("not known: %s", KNOWN[i] != NULL ? KNOWN[i] : "no Host at all");
}

static void hosts_of_strangers(void **state)
{
	static const char *const STRANGE[] = {"",
	                                      ".",
	                                      ":",
	                                      ":9641",
	                                      "evil.example",
	                                      "evil.example:9641",
	                                      "127.0.0.1.evil.example",
	                                      "127.0.0.1.nip.io",
	                                      "localhost.evil.example",
	                                      "evillocalhost",
	                                      "evil-localhost",
	                                      ".localhost",
	                                      ".local",
	                                      "local",
	                                      "evillocal",
	                                      "status.example.org.evil.example",
	                                      "evil.status.example.org",
	                                      "status.example.org..",
	                                      "status.example.or",
	                                      "plant",
	                                      "plant77",
	                                      "2130706433",
	                                      "0x7f.1",
	                                      "127.1",
	                                      "0177.0.0.1",
	                                      "256.0.0.1",
	                                      "::1",
	                                      "[::1",
	                                      "[::1]x",
	                                      "[::1]:9641x",
	                                      "[evil.example]",
	                                      "[]",
	                                      "[127.0.0.1]",
	                                      "localhost:x",
	                                      "localhost:80:80",
	                                      "localhost:80@evil",
	                                      "u@localhost",
	                                      "localhost/",
	                                      " localhost",
	                                      "127.0.0.1 ",
	                                      "localhost,evil.example",
	                                      "[fe80::1%25eth0]",
	                                      "[::1]]",
	                                      "[1111111111111111111111111111111111111111111111111111111111111111]"};
	for (size_t i = 0; i < sizeof STRANGE / sizeof STRANGE[0]; i++)
		if (http_knows_host(STRANGE[i], NAMES, 3))
			fail_msg("known: \"%s\"", STRANGE[i]);
	assert_false(http_knows_host("plant7", NULL, 0));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(hosts_that_are_known),
	    cmocka_unit_test(hosts_of_strangers),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
