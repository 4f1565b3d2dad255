"""Breaks of what keeps the server safe: (file, fragment, broken fragment, the test that fails)."""

SERVE, TESTS = "llava_fast/serve/", "tests/serve/"
REMOTE, SERVER, ATTACKS = f"{TESTS}test_remote.py", f"{TESTS}test_server.py", f"{TESTS}test_attacks.py"
OPENAI, SLOW, PAGE = f"{TESTS}test_openai.py", f"{TESTS}test_slow_clients.py", f"{TESTS}test_page.py"
ANSWERS = f"{TESTS}test_answers.py"

MUTATIONS = [
    # pictures from elsewhere
    (f"{SERVE}addresses.py", '"169.254.0.0/16",', '"169.254.0.0/17",', f"{REMOTE}::test_addresses_that_are_not_public"),
    (f"{SERVE}addresses.py", '"2002::/16",', '"2003::/32",', f"{REMOTE}::test_addresses_that_are_not_public"),
    (f"{SERVE}remote.py", "not all(may_dial", "not any(may_dial", f"{REMOTE}::test_names_that_lead_inside"),
    (
        f"{SERVE}remote.py",
        "addresses = await _addresses(target, name, policy, resolve)",
        "addresses = await (resolve(target.host, target.port) if hop else _addresses(target, name, policy, resolve))",
        f"{REMOTE}::test_redirects_to_inside",
    ),
    (f"{SERVE}remote.py", "if len(data) > max_bytes:", "if False:", f"{REMOTE}::test_the_limit_of_bytes_is_exact"),
    (
        f"{SERVE}pinned.py",
        "connect_tcp(address, port",
        "connect_tcp(host, port",
        f"{REMOTE}::test_a_public_picture_at_the_address_that_was_checked",
    ),
    (
        f"{SERVE}urls.py",
        r"\x7f-\xa0\\]",
        r"\x7f-\xa0]",
        f"{REMOTE}::test_urls_that_parsers_read_differently_or_that_are_none",
    ),
    (
        f"{SERVE}app.py",
        "await while_there(http.receive, loading)",
        "await loading",
        f"{TESTS}test_pictures_from_elsewhere.py::test_a_client_that_leaves_while_its_picture_is_fetched",
    ),
    # keys and tenants
    (
        f"{SERVE}gate.py",
        'path == "/health":',
        'path.startswith("/health"):',
        f"{ATTACKS}::test_no_route_without_a_key",
    ),
    (f"{SERVE}gate.py", "if not found:", 'if not found and path != "/metrics":', f"{SERVER}::test_keys"),
    (
        f"{SERVE}asking.py",
        'salt = f"{visit.tenant}/',
        'salt = f"/',
        f"{SERVER}::test_tenants_share_no_cache",
    ),
    (f"{SERVE}gate.py", "if _NAME.match(text) else", "if text else", f"{ATTACKS}::test_request_ids_are_not_believed"),
    # bodies
    (
        f"{SERVE}gate.py",
        'if b"content-length" in headers and',
        "if False and",
        f"{ATTACKS}::test_heads_that_smuggle",
    ),
    (
        f"{SERVE}body.py",
        "        if size > settings.max_body_bytes:",
        "        if False:",
        f"{SERVER}::test_large_bodies_are_refused_while_read",
    ),
    (f"{SERVE}body.py", "if values > settings.max_values:", "if False:", f"{SERVER}::test_bodies"),
    (f"{SERVE}body.py", '!= "application/json":', '== "":', f"{SERVER}::test_bodies"),
    (
        f"{SERVE}gate.py",
        "if self.held_bytes + size > self.settings.max_total_bytes:",
        "if False:",
        f"{SERVER}::test_bodies_of_all_requests_together",
    ),
    # pictures and settings
    (f"{SERVE}data_uri.py", "if size > max_bytes:", "if False:", f"{TESTS}test_data_uri.py"),
    (
        f"{SERVE}images.py",
        "settings.max_image_pixels, settings",
        "1 << 40, settings",
        f"{ATTACKS}::test_pictures_of_too_many_pixels",
    ),
    (f"{SERVE}images.py", "if len(urls) > settings.max_images:", "if False:", f"{OPENAI}::test_errors"),
    (f"{SERVE}asking.py", "body.n > settings.max_n:", "False:", f"{OPENAI}::test_errors"),
    (
        f"{SERVE}asking.py",
        "if len(prompts) * n > settings.max_answers:",
        "if False:",
        f"{OPENAI}::test_bounds_of_completions",
    ),
    (f"{SERVE}asking.py", "if body.priority and not settings.allow_priority:", "if False:", f"{OPENAI}::test_errors"),
    # clients that are slow, or leave
    (
        f"{SERVE}slow_clients.py",
        "self._head.start(transport.abort)",
        "None",
        f"{SLOW}::test_a_head_that_never_ends",
    ),
    (
        f"{SERVE}slow_clients.py",
        "transport.close()\n            self._start_sending()",
        "transport.close()",
        f"{SLOW}::test_closing_does_not_wait_for_a_client_that_reads_nothing",
    ),
    (
        f"{SERVE}slow_clients.py",
        "transport.write_eof()",
        "transport.abort()",
        f"{SLOW}::test_who_is_refused_in_mid_body_reads_why",
    ),
    (
        f"{SERVE}answers.py",
        "        self._left = True\n        for",
        "        for _ in ():\n          for",
        f"{SERVER}::test_disconnect",
    ),
    # a stream's pace
    (
        f"{SERVE}answers.py",
        "await ended.wait()",
        "await asyncio.Event().wait()",
        f"{ANSWERS}::test_between_events_tokens_gather_and_the_end_waits_for_nothing",
    ),
    (
        f"{SERVE}answers.py",
        "if self._event_seconds and not",
        "if False and not",
        f"{ANSWERS}::test_between_events_tokens_gather_and_the_end_waits_for_nothing",
    ),
    (
        f"{SERVE}answers.py",
        "timeout(self._event_seconds)",
        "timeout(None)",
        f"{ANSWERS}::test_after_a_pause_what_has_gathered_is_sent",
    ),
    (
        f"{SERVE}answers.py",
        "yield [delta, *handle.take()]",
        "yield [delta, *handle.take()][:1]",
        f"{ANSWERS}::test_several_answers_share_a_body",
    ),
    (
        f"{SERVE}answers.py",
        "queue.put_nowait((prompt, error))",
        "queue.put_nowait((prompt, []))",
        f"{ANSWERS}::test_errors_in_a_pause_are_told_at_once",
    ),
    # what a request leaves behind
    (
        f"{SERVE}answers.py",
        "asyncio.timeout(self._send_seconds)",
        "asyncio.timeout(None)",
        f"{ANSWERS}::test_a_client_that_reads_nothing_ends_its_request",
    ),
    (
        f"{SERVE}answers.py",
        "            for handle in self._handles:\n                handle.cancel()\n",
        "",
        f"{ANSWERS}::test_errors_in_a_pause_are_told_at_once",
    ),
    (
        f"{SERVE}answers.py",
        "self._gate.handles.difference_update(self._handles)",
        "pass",
        f"{ANSWERS}::test_errors_in_a_pause_are_told_at_once",
    ),
    (
        f"{SERVE}gate.py",
        "                self.running -= 1\n",
        "                pass\n",
        f"{SERVER}::test_too_many_at_once",
    ),
    (
        f"{SERVE}gate.py",
        "self.held_bytes -= visit.body_bytes",
        "pass",
        f"{SERVER}::test_bodies_of_all_requests_together",
    ),
    # what is said
    (
        f"{SERVE}page.py",
        '"default-src": "\'none\'"',
        '"default-src": "\'self\'"',
        f"{PAGE}::test_one_response_that_lets_nothing_else_run",
    ),
    (f"{SERVE}conversations.py", '"sha256:" + ', "", f"{SERVER}::test_conversations_and_moderation"),
]
