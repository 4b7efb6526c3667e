"""The page, in a headless Chromium against real servers: every feature is used, and nothing that a model says acts."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from harness import DEMO, ROOT, RawConnection, give_up, local_server, need_tool, slowed, wait_for

import rustinfer
from rustinfer import ChatReply, ChunkReply, Page

FILE = ROOT / "web" / "index.html"
WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", event =>
    violations.push(`${event.violatedDirective}: ${event.blockedURI}`));
"""


@pytest.fixture(scope="module")
def browser():
    path = need_tool("chromium", "chromium-browser", "google-chrome")
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        give_up("needs the Python package playwright")
    expect.set_options(timeout=10_000)
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to run as root
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens pages; at the end none of them has broken its policy, thrown, or asked any other host."""
    pages, faults = [], []

    def open_page(server, view="", ready=True, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(10_000)
        context.add_init_script(WATCH)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((server.url, "data:", "blob:")) else faults.append(request.url)
            ),
        )
        page.goto(f"{server.url}/{view}")
        if ready:
            page.wait_for_selector("#status[data-state=ready]")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        faults += page.evaluate("violations")
        page.context.close()
    assert faults == []


@pytest.fixture
def expect():
    from playwright.sync_api import expect

    return expect


@pytest.fixture(scope="module")
def demo_llm():
    with rustinfer.LLM(DEMO, device="cpu") as llm:
        yield llm


@pytest.fixture
def endless(demo_llm):
    """The demo model, which never ends an answer by itself and takes 20 ms a token."""
    usual = demo_llm.default_params
    demo_llm.default_params = dataclasses.replace(usual, ignore_eos=True)
    with slowed(demo_llm, 0.02):
        yield demo_llm
    demo_llm.default_params = usual


@pytest.fixture
def speak(monkeypatch, demo_llm):
    """Answers whose text is given, in pieces, whatever the model says."""

    def say(*pieces):
        told = set()

        def text_event(self, index, text, tokens=()):
            new = () if id(self) in told else pieces
            told.add(id(self))
            return b"".join(ChunkReply.text_event(self, index, piece) for piece in new)

        monkeypatch.setattr(ChatReply, "text_event", text_event)

    return say


def send(page, text):
    """Write a message, and send it with the keyboard."""
    page.fill("#input", text)
    page.press("#input", "Enter")


def ask(page, text):
    """Send a message, and wait for its whole answer."""
    count = page.locator("article.assistant").count()
    send(page, text)
    page.locator("article.assistant[aria-busy=false] .facts b").nth(0).wait_for()
    page.wait_for_function(
        "count => document.querySelectorAll('article.assistant[aria-busy=false] .facts').length > count", arg=count
    )
    return page.locator("article.assistant").last


def request_body(page, action):
    """The JSON of the chat request that the action makes."""
    with page.expect_request("**/v1/chat/completions") as caught:
        action()
    return caught.value.post_data_json


class TestServed:
    def test_it_is_small_and_asks_nobody_else(self):
        text = FILE.read_text(encoding="utf-8")
        assert FILE.stat().st_size < 120_000
        assert re.findall(r"(?:src|href|action)=\"(?!#|data:)[^\"]*\"|@import|url\(", text) == []
        assert not re.search(
            r"\.(innerHTML|outerHTML)\b|insertAdjacentHTML|document\.write|\beval\(|new Function", text
        )

    def test_the_policy_allows_what_is_in_the_file_and_nothing_else(self, demo_server):
        status, headers, body = demo_server.get("/")
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert (status, body) == (200, FILE.read_bytes())
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["frame-ancestors"] == "'none'" and policy["connect-src"] == "'self'"
        assert all(re.fullmatch(r"'sha256-[\w+/]{43}='", policy[name]) for name in ("script-src", "style-src"))
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"

    def test_a_page_that_is_known_is_not_sent_again(self, demo_server):
        tag = demo_server.get("/")[1]["etag"]
        with RawConnection(demo_server.port) as raw:
            raw.send_request("GET", "/", headers={"If-None-Match": f'"other", W/{tag}'})
            status, headers = raw.read_head()
            assert status == 304 and headers["etag"] == tag and headers["cache-control"] == "no-cache"
            assert "content-length" not in headers
            assert raw.request("GET", "/", headers={"If-None-Match": '"other"'})[0] == 200  # the connection goes on

    def test_a_new_version_is_seen_at_once(self, tmp_path):
        file = tmp_path / "index.html"
        file.write_text("<style>a</style><script>1</script>")
        page = Page(file)
        before = page.load()
        assert page.load() == before
        file.write_text("<style>a</style><script>2</script>")
        os.utime(file, ns=(1, 1))
        body, headers = page.load()
        assert b">2<" in body and headers["ETag"] != before[1]["ETag"]
        assert headers["Content-Security-Policy"] != before[1]["Content-Security-Policy"]

    def test_the_browser_refuses_inline_code_markup_and_other_hosts(self, demo_server, browser):
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(demo_server.url)
            tried = page.evaluate("""async () => {
                const refused = [], attempt = (name, act) => { try { act(); } catch { refused.push(name); } };
                attempt("script", () => { document.createElement("script").textContent = "window.ran = 1"; });
                attempt("handler", () => document.body.setAttribute("onclick", "window.ran = 1"));
                attempt("markup", () => { document.body.innerHTML = "<b>x</b>"; });
                await fetch("https://example.com/").catch(() => refused.push("fetch"));
                await new Promise(resolve => {
                    const image = new Image();
                    image.onerror = () => { refused.push("image"); resolve(); };
                    image.src = "https://example.com/pixel.png";
                });
                return refused;
            }""")
            assert tried == ["script", "handler", "markup", "fetch", "image"] and page.evaluate("window.ran") is None


class TestChat:
    def test_an_answer_streams_and_tells_its_numbers(self, demo_server, visit, expect):
        page = visit(demo_server)
        answer = ask(page, "What is Rust?")
        expect(answer).to_contain_text("Rust is a systems programming language")
        facts = answer.locator(".facts").inner_text()
        assert re.search(
            r"ms to first token\s+[\d,.]+ tokens/s\s+\d+ tokens\s+16 prompt, \d+ cached\s+finish: stop", facts
        )
        expect(page.locator("#live")).to_contain_text("Answer complete.")
        assert "Rust is a" in page.locator("#live").inner_text()

    def test_the_conversation_goes_along(self, demo_server, visit):
        page = visit(demo_server)
        ask(page, "Hello")
        body = request_body(page, lambda: ask(page, "Tell me a joke."))
        assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
        assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["model"] == "demo"

    def test_a_question_can_be_chosen(self, demo_server, visit, expect):
        page = visit(demo_server)
        page.get_by_role("button", name="Count to 10.").click()
        expect(page.locator("article.assistant")).to_contain_text("1, 2, 3, 4")

    def test_stop_ends_the_request_and_keeps_what_came(self, endless, visit, expect):
        with local_server(endless) as server:
            page = visit(server)
            page.fill("#input", "What is Rust?")
            page.get_by_role("button", name="Send").click()
            expect(page.locator("article.assistant")).to_contain_text("Rust is a")
            page.get_by_role("button", name="Stop").click()
            wait_for(lambda: endless.engine.snapshot()["num_requests_running"] == 0)
            facts = page.locator("article.assistant .facts")
            expect(facts).to_contain_text("finish: stopped")
            expect(facts).to_contain_text("to first token")
            expect(page.locator("article.assistant")).to_contain_text("Rust is a")
            page.get_by_role("button", name="Send").wait_for()

    def test_regenerate_asks_again_without_the_old_answer(self, demo_server, visit, expect):
        page = visit(demo_server)
        ask(page, "Hello")
        body = request_body(page, page.get_by_role("button", name="Regenerate the answer").click)
        assert body["messages"] == [{"role": "user", "content": "Hello"}]
        expect(page.locator("article.assistant[aria-busy=false] .facts b").first).to_be_visible()
        assert page.locator("article.assistant").count() == 1

    def test_an_edited_message_is_sent_again_and_what_followed_is_gone(self, demo_server, visit, expect):
        page = visit(demo_server)
        ask(page, "Hello")
        ask(page, "Tell me a joke.")
        page.get_by_role("button", name="Edit the message").first.click()
        page.get_by_label("Edited message").fill("What is Rust?")
        body = request_body(page, page.locator("form.edit").get_by_role("button", name="Send").click)
        assert body["messages"] == [{"role": "user", "content": "What is Rust?"}]
        expect(page.locator("article.assistant")).to_contain_text("Rust is a")
        assert page.locator("article").count() == 2

    def test_an_edit_can_be_given_up(self, demo_server, visit, expect):
        page = visit(demo_server)
        ask(page, "Hello")
        page.get_by_role("button", name="Edit the message").click()
        page.get_by_label("Edited message").press("Escape")
        expect(page.locator("article.user .bubble")).to_be_visible()
        assert page.locator("form.edit").count() == 0

    def test_answers_messages_and_code_can_be_copied(self, demo_llm, speak, visit, expect):
        speak("Like *this*:\n\n```py", "thon\nprint(1)\n``", "`\ndone")
        with local_server(demo_llm) as server:
            page = visit(server, permissions=["clipboard-read", "clipboard-write"])
            answer = ask(page, "Code <please>")
            for name, text in (
                ("Copy the code", "print(1)"),
                ("Copy the message", "Code <please>"),
                ("Copy the answer", "Like *this*:\n\n```python\nprint(1)\n```\ndone"),
            ):
                page.get_by_role("button", name=name).click()
                expect(page.locator("#toast")).to_have_text("Copied")
                assert page.evaluate("navigator.clipboard.readText()") == text
            expect(answer.locator(".code .bar span")).to_have_text("python")

    def test_copying_works_where_the_clipboard_is_forbidden(self, demo_server, visit, expect):
        page = visit(demo_server)
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        page.evaluate("document.addEventListener('copy', () => { window.copied = document.activeElement.value; })")
        page.evaluate("copy('by selection')")
        assert page.evaluate("copied") == "by selection"

    def test_a_system_prompt_belongs_to_its_conversation(self, demo_server, visit, expect):
        page = visit(demo_server)
        page.get_by_role("button", name="Settings", exact=True).click()
        page.get_by_label("System prompt").fill("Be brief.")
        body = request_body(page, lambda: ask(page, "Hello"))
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        page.get_by_role("button", name="New chat").click()
        expect(page.get_by_label("System prompt")).to_have_value("")
        page.get_by_role("button", name="Hello", exact=True).click()
        expect(page.get_by_label("System prompt")).to_have_value("Be brief.")

    def test_the_model_is_picked_from_those_that_are_served(self, demo_server, visit, expect):
        page = visit(demo_server)
        page.route(
            "**/v1/models",
            lambda route: route.fulfill(json={"object": "list", "data": [{"id": "demo"}, {"id": "other/<b>model"}]}),
        )
        page.reload()
        page.wait_for_selector("#status[data-state=ready]")
        page.get_by_role("button", name="Settings", exact=True).click()
        page.get_by_label("Model", exact=True).select_option("other/<b>model")
        page.fill("#input", "Hello")
        body = request_body(page, lambda: page.press("#input", "Enter"))
        assert body["model"] == "other/<b>model"
        expect(page.locator(".problem")).to_contain_text("does not exist")

    def test_sampling_shows_the_servers_defaults_and_sends_what_is_changed(self, demo_server, visit, expect):
        page = visit(demo_server)
        page.get_by_role("button", name="Settings", exact=True).click()
        for label, usual in (
            ("Max tokens", "1024"),
            ("Temperature", "0"),
            ("Top p", "1"),
            ("Top k", "0"),
            ("Repetition penalty", "1"),
            ("Seed", "random"),
        ):
            expect(page.get_by_label(label, exact=True)).to_have_attribute("placeholder", usual)
        page.get_by_label("Max tokens").fill("5")
        page.get_by_label("Temperature slider").fill("0.7")
        page.get_by_label("Seed").fill("7")
        page.get_by_label("Stop sequences").fill("zebra\n\nlion")
        expect(page.get_by_label("Temperature", exact=True)).to_have_value("0.7")
        page.reload()  # they are kept
        page.wait_for_selector("#status[data-state=ready]")
        body = request_body(page, lambda: ask(page, "Count to 10."))
        changed = {"max_tokens": 5, "temperature": 0.7, "seed": 7, "stop": ["zebra", "lion"]}
        assert {name: body[name] for name in changed} == changed and "top_p" not in body
        expect(page.locator("article.assistant .facts")).to_contain_text("finish: length")
        page.get_by_role("button", name="Settings", exact=True).click()
        page.locator("#reset").click()
        expect(page.get_by_label("Temperature", exact=True)).to_have_value("")
        body = request_body(page, lambda: ask(page, "Count to 10."))
        assert not set(changed) & set(body)

    def test_token_probabilities_by_pointer_and_by_keyboard(self, demo_server, visit, expect):
        page = visit(demo_server)
        page.get_by_role("button", name="Settings", exact=True).click()
        page.get_by_role("checkbox", name="Token probabilities").check()
        answer, tip = ask(page, "What is Rust?"), page.locator("#tip")
        tokens = answer.locator(".tokens span")
        assert tokens.count() > 10 and "".join(tokens.all_inner_texts()).startswith("Rust is a systems")
        tokens.nth(2).hover()
        expect(tip.locator("li")).to_have_count(5)
        assert re.search(r"\d\.\d %", tip.inner_text())
        page.mouse.move(1, 1)
        expect(tip).to_be_hidden()
        answer.locator(".tokens").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(tip).to_be_visible()
        expect(answer.locator(".tokens .at")).to_have_attribute("data-place", "1")
        page.keyboard.press("Escape")
        expect(tip).to_be_hidden()
        page.get_by_role("button", name="Show the text").click()
        expect(answer.locator(".md p")).to_contain_text("Rust is a systems")
        page.reload()
        expect(page.locator(".open")).to_have_text("What is Rust?")
        page.locator(".open").click()
        expect(page.locator(".tokens span").first).to_be_visible()

    def test_the_keyboard_brings_a_token_into_view(self, demo_server, visit, expect):
        page = visit(demo_server)
        page.evaluate(
            "current.messages.push({role: 'assistant', content: 'x', tokens: Array.from({length: 200},"
            " (_, n) => [n + '\\n', -1, []])}); show(current)"
        )
        page.wait_for_function("() => dirty.size === 0")
        page.locator(".tokens").focus()
        page.evaluate("document.getElementById('thread').scrollTop = 0")
        for _ in range(60):
            page.keyboard.press("ArrowRight")
        expect(page.locator(".tokens .at")).to_have_text("59")
        expect(page.locator(".tokens .at")).to_be_in_viewport()
        expect(page.locator("#tip")).to_be_in_viewport()

    def test_the_view_follows_the_answer_unless_the_reader_has_left_the_end(self, demo_llm, speak, visit, expect):
        speak("\n\n".join(f"Paragraph {n}" for n in range(80)))
        with local_server(demo_llm) as server:
            page = visit(server)
            ask(page, "Hello")
            expect(page.get_by_text("Paragraph 79")).to_be_in_viewport()
            page.locator("#thread").hover()
            page.mouse.wheel(0, -1500)
            expect(page.get_by_role("button", name="Latest")).to_be_visible()
            page.get_by_role("button", name="Latest").click()
            expect(page.get_by_text("Paragraph 79")).to_be_in_viewport()
            expect(page.get_by_role("button", name="Latest")).to_be_hidden()


FULL = """() => {
    const refuse = () => { throw new DOMException("", "QuotaExceededError"); };
    Storage.prototype.setItem = IDBObjectStore.prototype.put = refuse;
}"""


class TestFullStorage:
    def test_settings_and_theme_act_and_show_what_they_do(self, demo_server, visit, expect):
        page = visit(demo_server)
        page.evaluate(FULL)
        page.get_by_role("button", name="Settings", exact=True).click()
        page.get_by_label("Temperature", exact=True).fill("0.7")
        assert request_body(page, lambda: ask(page, "Hello"))["temperature"] == 0.7
        for theme in ("light", "dark", "system"):
            page.locator("#theme").click()
            expect(page.locator("#theme")).to_have_accessible_name(f"Theme: {theme}")

    def test_conversations_last_as_long_as_the_page(self, demo_server, visit, expect, tmp_path):
        page = visit(demo_server)
        page.evaluate(FULL)
        ask(page, "Hello")
        page.get_by_role("button", name="New chat").click()
        ask(page, "Tell me a joke.")
        page.evaluate("reload()")  # as when the tab is looked at again
        expect(page.locator("#items .open")).to_have_text(["Tell me a joke.", "Hello"])
        (tmp_path / "file.json").write_text('{"conversations": [{"messages": [{"role": "user", "content": "x"}]}]}')
        page.locator("#file").set_input_files(tmp_path / "file.json")
        expect(page.locator("#toast")).to_contain_text("no room")

    def test_a_key_is_used(self, demo_llm, visit):
        with local_server(demo_llm, api_key=("secret-key-1",)) as server:
            page = visit(server, ready=False)
            page.evaluate(FULL)
            page.get_by_role("dialog").get_by_label("Key").fill("secret-key-1")
            page.keyboard.press("Enter")
            ask(page, "Hello")


class TestConversations:
    def test_they_survive_a_reload(self, demo_server, visit, expect):
        page = visit(demo_server)
        ask(page, "What is Rust?")
        page.get_by_role("button", name="New chat").click()
        ask(page, "Tell me a joke.")
        page.reload()
        expect(page.locator("#items .open")).to_have_text(["Tell me a joke.", "What is Rust?"])
        page.get_by_role("button", name="What is Rust?", exact=True).first.click()
        expect(page.locator("article.assistant")).to_contain_text("Rust is a systems")
        expect(page.locator("article.assistant .facts")).to_contain_text("finish: stop")

    def test_rename(self, demo_server, visit, expect):
        page = visit(demo_server)
        ask(page, "Hello")
        page.get_by_role("button", name="Rename Hello").click()
        page.get_by_label("Name", exact=True).fill("<i>Greetings</i>")
        page.keyboard.press("Enter")
        expect(page.locator("#items .open")).to_have_text("<i>Greetings</i>")
        page.reload()
        expect(page.locator("#items .open")).to_have_text("<i>Greetings</i>")

    def test_delete_asks_first(self, demo_server, visit, expect):
        page = visit(demo_server)
        ask(page, "Hello")
        for button, left in (("Cancel", 1), ("Delete", 0)):
            page.get_by_role("button", name="Delete Hello").click()
            expect(page.get_by_role("dialog").get_by_role("checkbox")).to_be_hidden()
            page.get_by_role("dialog").get_by_role("button", name=button).click()
            expect(page.locator("#items li")).to_have_count(left)
        expect(page.locator("#welcome")).to_be_visible()
        page.reload()
        page.wait_for_selector("#status[data-state=ready]")
        assert page.evaluate("store.all()") == []

    def test_export_and_import_elsewhere(self, demo_server, visit, expect, tmp_path):
        page = visit(demo_server)
        ask(page, "What is Rust?")
        with page.expect_download() as download:
            page.get_by_role("button", name="Export").click()
        file = tmp_path / "conversations.json"
        download.value.save_as(file)
        assert json.loads(file.read_text())["conversations"][0]["messages"][0] == {
            "role": "user",
            "content": "What is Rust?",
        }
        other = visit(demo_server)
        other.locator("#file").set_input_files(file)
        expect(other.locator("article.assistant")).to_contain_text("Rust is a systems")
        other.reload()
        expect(other.locator("#items .open")).to_have_text("What is Rust?")

    @pytest.mark.parametrize("text", ["no JSON", "{}", '{"conversations": [null, {"messages": [{"role": "root"}]}]}'])
    def test_a_file_that_holds_none_is_told(self, demo_server, visit, expect, tmp_path, text):
        (tmp_path / "file.json").write_text(text)
        page = visit(demo_server)
        page.locator("#file").set_input_files(tmp_path / "file.json")
        expect(page.locator("#toast")).to_have_text("This file holds no conversations")

    def test_an_imported_file_brings_only_what_a_conversation_has(self, demo_server, visit, expect, tmp_path):
        hostile = {
            "id": "__proto__",
            "title": {"a": 1},
            "__proto__": {"x": 1},
            "updated": "soon",
            "system": ["x"],
            "messages": [
                {"role": "system", "content": "dropped"},
                {"role": "user", "content": "kept", "evil": 1},
                {
                    "role": "assistant",
                    "content": "<img src=x>",
                    "tokens": [["a", "b", 3]],
                    "numbers": {"ttft": "x", "finish": 5},
                },
            ],
        }
        (tmp_path / "file.json").write_text(json.dumps({"conversations": [hostile]}))
        page = visit(demo_server)
        page.locator("#file").set_input_files(tmp_path / "file.json")
        expect(page.locator("article.assistant .md")).to_have_text("<img src=x>")
        (saved,) = page.evaluate("store.all()")
        assert re.fullmatch("[0-9a-f]{16}", saved["id"]) and (saved["title"], saved["system"]) == ("", "")
        assert saved["messages"] == [
            {"role": "user", "content": "kept"},
            {"role": "assistant", "content": "<img src=x>", "numbers": {"finish": "5"}},
        ]

    def test_an_imported_file_replaces_nothing(self, demo_server, visit, expect, tmp_path):
        one = {"id": "0123456789abcdef", "title": "one", "messages": [{"role": "user", "content": "x"}]}
        file = {"conversations": [one, {**one, "title": "two"}, {**one, "title": "three", "id": [one["id"]]}]}
        (tmp_path / "file.json").write_text(json.dumps(file))
        page = visit(demo_server)
        page.locator("#file").set_input_files(tmp_path / "file.json")
        expect(page.locator("#toast")).to_have_text("Imported 3 conversations")
        assert sorted(page.locator("#items .open").all_inner_texts()) == ["one", "three", "two"]
        assert all(re.fullmatch("[0-9a-f]{16}", saved["id"]) for saved in page.evaluate("store.all()"))

    def test_two_answers_at_once(self, endless, visit, expect):
        with local_server(endless) as server:
            page = visit(server)
            send(page, "What is Rust?")
            expect(page.locator("article.assistant")).to_contain_text("Rust is")
            page.get_by_role("button", name="New chat").click()
            send(page, "Count to 10.")
            expect(page.locator("article.assistant")).to_contain_text("1, 2")
            page.get_by_role("button", name="What is Rust?", exact=True).first.click()
            expect(page.locator("article.assistant")).to_contain_text("systems programming")
            assert endless.engine.snapshot()["num_requests_running"] == 2

    def test_another_tab_sees_them(self, demo_server, visit, expect):
        page = visit(demo_server)
        other = page.context.new_page()
        other.goto(demo_server.url)
        ask(page, "Hello")
        expect(other.locator("#items .open")).to_have_text("Hello")

    def test_two_tabs_in_one_conversation_lose_nothing(self, demo_server, visit, expect):
        page = visit(demo_server)
        ask(page, "Hello")
        other = page.context.new_page()
        other.goto(demo_server.url)
        other.locator("#items .open").click()
        ask(page, "Tell me a joke.")
        expect(other.locator("article")).to_have_count(4)
        page.get_by_role("button", name="Rename Hello").click()
        page.get_by_label("Name", exact=True).fill("Greetings")
        page.keyboard.press("Enter")
        expect(other.locator("#items .open")).to_have_text("Greetings")
        ask(other, "Count to 10.")
        expect(page.locator("article")).to_have_count(6)
        (saved,) = page.evaluate("store.all()")
        assert len(saved["messages"]) == 6 and saved["title"] == "Greetings"

    def test_a_conversation_deleted_in_another_tab_is_gone(self, demo_server, visit, expect):
        page = visit(demo_server)
        ask(page, "Hello")
        other = page.context.new_page()
        other.goto(demo_server.url)
        expect(other.locator("#items .open")).to_have_text("Hello")
        page.get_by_role("button", name="Delete Hello").click()
        page.keyboard.press("Enter")
        expect(other.locator("#items li")).to_have_count(0)


class TestErrors:
    def test_a_key_is_asked_for_and_used(self, demo_llm, visit, expect):
        with local_server(demo_llm, api_key=("secret-key-1",)) as server:
            page = visit(server, ready=False)
            dialog = page.get_by_role("dialog")
            dialog.get_by_label("Key").fill("wrong-key")
            page.keyboard.press("Enter")
            expect(page.locator("#status")).to_contain_text("key needed")
            dialog.get_by_label("Key").fill("secret-key-1")
            page.keyboard.press("Enter")
            ask(page, "Hello")
            page.reload()  # kept for the tab
            page.wait_for_selector("#status[data-state=ready]")
            assert page.evaluate("localStorage.getItem('rustinfer.key')") == '""'
            page.get_by_role("button", name="API key").click()
            dialog.get_by_label("Remember it in this browser").check()
            page.keyboard.press("Enter")
            expect(dialog).to_be_hidden()
            wait_for(lambda: page.evaluate("localStorage.getItem('rustinfer.key')") == '"secret-key-1"')

    @pytest.mark.parametrize("key, code", [("\u201csecret-key-1\u201d", "U+201C"), ("key\U0001f511", "U+1F511")])
    def test_a_key_that_no_header_holds_is_told(self, demo_llm, visit, expect, key, code):
        with local_server(demo_llm, api_key=("secret-key-1",)) as server:
            page = visit(server, ready=False)
            page.get_by_role("dialog").get_by_label("Key").fill(key)
            page.keyboard.press("Enter")
            expect(page.get_by_role("dialog")).to_contain_text(f"The character {code} cannot be part of a key.")

    def test_a_request_that_needs_a_key_goes_on_with_it(self, demo_llm, visit, expect):
        with local_server(demo_llm, api_key=("secret-key-1",)) as server:
            page = visit(server, ready=False)
            page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
            send(page, "What is Rust?")
            page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
            expect(page.locator(".problem")).to_contain_text("asks for an API key")
            page.get_by_role("button", name="Enter the key").click()
            page.get_by_role("dialog").get_by_label("Key").fill("secret-key-1")
            page.keyboard.press("Enter")
            expect(page.locator("article.assistant")).to_contain_text("Rust is a")

    def test_too_many_requests_count_down(self, demo_llm, visit, expect):
        with local_server(demo_llm, requests_per_minute=20) as server:
            page = visit(server)
            page.fill("#input", "Hello")
            while post_chat(server) != 429:
                pass
            page.press("#input", "Enter")
            problem = page.locator(".problem")
            expect(problem).to_contain_text("Too many requests")
            expect(problem.get_by_role("button")).to_have_text(re.compile(r"Try again in \d s"))
            expect(problem.get_by_role("button")).to_be_disabled()
            expect(problem.get_by_role("button", name="Try again", exact=True)).to_be_enabled()
            problem.get_by_role("button").click()
            expect(page.locator("article.assistant .facts")).to_contain_text("finish: stop")

    def test_a_conversation_that_is_too_long(self, demo_server, visit, expect):
        page = visit(demo_server)
        page.fill("#input", "word " * 6000)
        page.get_by_role("button", name="Send").click()
        problem = page.locator(".problem")
        expect(problem).to_contain_text("Too long for this model")
        assert re.search(r"maximum context length is 4096 tokens", problem.inner_text())

    def test_a_value_that_is_refused_is_told_with_its_field(self, demo_server, visit, expect):
        page = visit(demo_server)
        page.get_by_role("button", name="Settings", exact=True).click()
        page.get_by_label("Temperature", exact=True).fill("9")
        send(page, "Hello")
        expect(page.locator(".problem")).to_contain_text("temperature")

    def test_a_server_that_goes_and_comes_back(self, demo_llm, visit, expect):
        with local_server(demo_llm) as server:
            page, port = visit(server), server.port
        send(page, "What is Rust?")
        expect(page.locator(".problem")).to_contain_text("No connection to the server")
        expect(page.locator("#notice")).to_contain_text("cannot be reached")
        with rustinfer.Server(demo_llm, port=port):
            page.wait_for_selector("#status[data-state=ready]")
            expect(page.locator("#notice")).to_be_hidden()
            page.get_by_role("button", name="Try again").click()
            expect(page.locator("article.assistant")).to_contain_text("Rust is a")

    def test_a_server_that_stops_in_mid_answer(self, endless, visit, expect):
        with local_server(endless) as server:
            page = visit(server)
            send(page, "What is Rust?")
            expect(page.locator("article.assistant")).to_contain_text("Rust is a")
        expect(page.locator(".problem")).to_contain_text("The answer was cut off")
        expect(page.locator("article.assistant")).to_contain_text("Rust is a")
        page.wait_for_selector("#status[data-state=offline]")

    @pytest.mark.parametrize("body", ["null", "<html>", '{"error": "text"}', '{"error": {"message": null}}'])
    def test_an_error_that_is_not_this_servers(self, demo_server, visit, expect, body):
        page = visit(demo_server)
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=502, body=body))
        send(page, "Hello")
        expect(page.locator(".problem")).to_contain_text("The server answered 502.")

    def test_a_model_that_still_loads(self, demo_llm, visit, expect):
        with local_server() as server:
            page = visit(server, ready=False)
            expect(page.locator("#notice")).to_have_text("The model is loading.")
            server.attach(demo_llm)
            page.wait_for_selector("#status[data-state=ready]")
            expect(page.locator("#notice")).to_be_hidden()

    def test_a_stream_that_breaks_off_keeps_its_text(self, endless, visit, expect):
        with local_server(endless) as server:
            page = visit(server)
            send(page, "What is Rust?")
            expect(page.locator("article.assistant")).to_contain_text("Rust is a")
            for handler in list(server.connections):
                rustinfer.close_socket(handler.connection)
            expect(page.locator(".problem")).to_contain_text("cut off")
            expect(page.locator("article.assistant")).to_contain_text("Rust is a")
            expect(page.locator("article.assistant .facts")).to_contain_text("finish: error")


def post_chat(server, **fields):
    with RawConnection(server.port) as raw:
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, **fields}
        return raw.request("POST", "/v1/chat/completions", body)[0]


class TestDashboard:
    def test_charts_move_and_bars_grow(self, endless, visit, expect):
        with local_server(endless) as server:
            page = visit(server, "#dashboard")
            with concurrent.futures.ThreadPoolExecutor() as pool:
                pool.submit(post_chat, server, max_tokens=2000)
                row = page.locator("#timeline li.running")
                row.wait_for()
                decode = row.locator(".decode")
                width = lambda: decode.evaluate("bar => parseFloat(bar.style.width)")
                numbers = lambda: int(
                    re.search(r"([\d,]+) token", row.locator(".numbers").inner_text())[1].replace(",", "")
                )
                first = numbers()
                wait_for(lambda: numbers() > first and width() > 50)
                expect(page.locator(".chart", has_text="Requests")).to_contain_text("1 / 0")
                value = page.locator(".chart", has_text="Tokens per second").locator(".now")
                wait_for(lambda: float(value.inner_text().split()[0].replace("tokens/s", "")) > 0)
                page.get_by_role("button", name="Cancel request").click()
                expect(page.locator("#timeline li.ended")).to_contain_text("abort")
            expect(page.locator("#recent tbody tr")).to_contain_text("abort")
            path = page.locator(".chart", has_text="Tokens per second").locator("path").nth(1).get_attribute("d")
            assert path.count("L") >= 2

    def test_ended_requests_give_ttft_prefix_hits_and_a_row(self, demo_llm, visit, expect):
        with local_server(demo_llm) as server:
            page = visit(server, "#dashboard")
            page.locator("#recent thead th").first.wait_for()
            page.wait_for_function("() => board.before")
            for _ in range(2):
                post_chat(server)
            expect(page.locator(".chart", has_text="Time to first token").locator(".now")).to_contain_text("ms")
            expect(page.locator(".chart", has_text="Prefix hits").locator(".now")).to_contain_text("%")
            expect(page.locator("#recent tbody tr")).to_have_count(2)
            expect(page.locator("#timeline li.ended")).to_have_count(2)
            for name, unit in (("CPU", "%"), ("Memory", "GB"), ("KV blocks", "/")):
                expect(page.locator(".chart", has_text=name).first.locator(".now")).to_contain_text(unit)
            expect(page.locator(".chart", has_text="GPU").first).to_be_hidden()

    def test_a_card_has_charts(self, demo_llm, visit, expect):
        with local_server(demo_llm) as server:
            server._probe.card = lambda: {
                "device_id": 0,
                "utilization_percent": 73,
                "memory_used_mb": 6144,
                "memory_total_mb": 24576,
                "temperature_celsius": 61,
                "power_watts": 120.0,
            }
            page = visit(server, "#dashboard")
            for name, text in (("GPU utilisation", "73%"), ("GPU memory", "6.0 / 24.0"), ("GPU temperature", "61°C")):
                expect(page.locator(".chart", has_text=name)).to_contain_text(text)

    def test_it_rests_while_nobody_looks(self, demo_server, visit):
        page = visit(demo_server)
        asked = []
        page.on("request", lambda request: asked.append(request.url) if "/v1/queue" in request.url else None)
        page.wait_for_timeout(1100)
        assert asked == []  # another view
        page.get_by_role("link", name="Dashboard").click()
        wait_for(lambda: page.wait_for_timeout(100) or len(asked) >= 2)
        page.evaluate("""() => {
            Object.defineProperty(document, "hidden", {value: true, configurable: true});
            document.dispatchEvent(new Event("visibilitychange"));
        }""")
        page.wait_for_timeout(200)
        count = len(asked)
        page.wait_for_timeout(1200)
        assert len(asked) == count
        page.evaluate("""() => { delete document.hidden; document.dispatchEvent(new Event("visibilitychange")); }""")
        wait_for(lambda: page.wait_for_timeout(100) or len(asked) > count)


class TestTryIt:
    def examples(self, page, language):
        page.get_by_label(language).check(force=True)
        return page.locator("#routes .code code").evaluate_all("nodes => nodes.map(node => node.textContent)")

    def test_every_route_is_there(self, demo_server, visit):
        page = visit(demo_server, "#try")
        shown = set(page.locator("#routes h3").all_inner_texts())
        paths = {re.sub(r"^(GET|POST|DELETE)\s*", "", text).strip() for text in shown}
        assert paths == {
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/models",
            "/v1/models/demo",
            "/tokenize",
            "/detokenize",
            "/apply-template",
            "/v1/queue",
            "/v1/queue/an-x-request-id",
            "/v1/metrics",
            "/metrics",
            "/v1/capabilities",
            "/openapi.json",
            "/version",
            "/ready",
            "/health",
        }

    def run(self, command, **variables):
        env = {**os.environ, **variables}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=True).stdout

    def test_every_example_for_curl_runs(self, demo_server, visit):
        need_tool("curl")
        for code in self.examples(visit(demo_server, "#try"), "curl"):
            answer = self.run(["bash", "-c", code])
            assert demo_server.url in code and answer
            assert ('"error"' in answer[:10]) == ("an-x-request-id" in code), (code, answer)

    def test_every_example_in_python_runs(self, demo_server, visit):
        examples = self.examples(visit(demo_server, "#try"), "Python")
        (refused,) = [code for code in examples if "an-x-request-id" in code]
        examples.remove(refused)
        assert "Rust is a systems" in self.run([sys.executable, "-c", "\n".join(examples)])
        with pytest.raises(subprocess.CalledProcessError) as error:
            self.run([sys.executable, "-c", refused])
        assert "HTTP Error 404" in error.value.stderr

    def test_every_example_in_javascript_runs(self, demo_server, visit):
        page = visit(demo_server, "#try")
        for code in self.examples(page, "JavaScript"):
            text = page.evaluate(
                f"(async () => {{ let out = ''; const console = {{log: text => out += text}};\n{code}\nreturn out;"
                " })()"
            )
            assert text and ("an-x-request-id" in code) == ('"error"' in text[:10]), (code, text[:200])

    def test_run_shows_the_answer(self, demo_server, visit, expect):
        page = visit(demo_server, "#try")
        page.get_by_role("button", name="Run GET /version").click()
        expect(page.locator(".reply:not(:empty)")).to_contain_text(rustinfer.__version__)
        page.get_by_role("button", name="Run DELETE /v1/queue").click()
        expect(page.locator(".reply", has_text="404")).to_contain_text("no request")

    def test_with_a_key_the_examples_name_it_and_do_not_show_it(self, demo_llm, visit, expect):
        with local_server(demo_llm, api_key=("secret-key-1",)) as server:
            page = visit(server, "#try", ready=False)
            page.get_by_role("dialog").get_by_label("Key").fill("secret-key-1")
            page.keyboard.press("Enter")
            page.wait_for_selector("#status[data-state=ready]")
            for language, name in (("curl", "$API_KEY"), ("Python", 'os.environ["API_KEY"]'), ("JavaScript", "apiKey")):
                examples = self.examples(page, language)
                assert sum(name in code for code in examples) == len(examples) - 2  # /ready and /health are open
                assert "secret-key-1" not in "".join(examples)
            code = self.examples(page, "Python")
            self.run([sys.executable, "-c", f"{code[1]}\n{code[4]}"], API_KEY="secret-key-1")


class TestUse:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [375, 1280])
    def test_axe_finds_nothing(self, endless, visit, expect, scheme, width):
        from axe_playwright_python.sync_playwright import Axe

        with local_server(endless) as server:
            page = visit(server, viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce")

            def check(view):
                found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
                assert [
                    (view, fault["id"], fault["nodes"][0]["html"][:200], fault["nodes"][0]["failureSummary"])
                    for fault in found
                ] == []

            check("welcome")
            page.evaluate(
                "current.messages.push({role: 'user', content: 'Hi'}, {role: 'assistant', content:"
                f" {json.dumps(SAMPLE)}, numbers: {{ttft: 9, rate: 99, prompt: 5, cached: 0, completion: 9, finish:"
                " 'stop'}}); save(current); show(current)"
            )
            expect(page.locator("article.assistant table")).to_be_visible()
            check("conversation")
            page.evaluate("void answer(current)")
            expect(page.get_by_role("button", name="Stop")).to_be_visible()
            check("streaming")
            page.get_by_role("button", name="Settings", exact=True).click()
            check("settings")
            page.keyboard.press("Escape")
            page.get_by_role("link", name="Dashboard").click()
            page.locator("#timeline li.running").wait_for()
            check("dashboard")
            page.get_by_role("link", name="Try it").click()
            check("try it")
            page.get_by_role("link", name="Chat").click()
            page.get_by_role("button", name="Stop").click()
            page.get_by_role("button", name="Send").wait_for()
            if width == 375:
                page.get_by_role("button", name="Conversations").click()
                check("conversations")
                page.keyboard.press("Escape")
            page.evaluate("""() => {
                const tokens = [-.01, -.2, -.6, -1.2, -3].map(
                    chance => ["word ", chance, [["word ", chance], ["other", -5]]]);
                current.messages.splice(0, 9, {role: "user", content: "Hi"},
                    {role: "assistant", content: "word", tokens, numbers: {}});
                problems.set(current.id, new Failure("Wait", {status: 429, until: Date.now() + 60000}));
                show(current);
                askForKey("Say it");
            }""")
            check("key")
            page.keyboard.press("Escape")
            page.locator(".tokens span").nth(2).hover()
            expect(page.locator("#tip")).to_be_visible()
            check("tokens and a problem")

    def test_the_theme_button_pins_a_theme(self, demo_server, visit):
        page = visit(demo_server, color_scheme="dark")
        dark = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 20, 19)"
        assert dark()
        page.get_by_role("button", name="Theme: system").click()
        assert not dark()
        page.reload()
        assert not dark()
        page.get_by_role("button", name="Theme: light").click()
        assert dark()
        page.get_by_role("button", name="Theme: dark").click()
        page.emulate_media(color_scheme="light")
        assert not dark()

    def test_an_address_without_a_view_is_the_chat(self, demo_server, visit, expect):
        page = visit(demo_server, "#/constructor")
        expect(page.locator("#chat")).to_be_visible()

    def test_a_method_is_one_line(self, demo_server, visit):
        page = visit(demo_server, "#/try", viewport={"width": 320, "height": 700})
        heights = page.locator(".method").evaluate_all("nodes => nodes.map(node => node.clientHeight)")
        assert max(heights) == min(heights)

    def test_nothing_is_wider_than_the_screen(self, demo_server, visit):
        page = visit(demo_server)
        page.evaluate(
            "current.messages.push({role: 'user', content: 'x'.repeat(500)}, {role: 'assistant', content:"
            f" {json.dumps(SAMPLE)} + 'y'.repeat(900), numbers: {{ttft: 9, rate: 99, prompt: 5, cached: 0, completion:"
            " 9, finish: 'stop'}}); show(current)"
        )
        page.locator("article.assistant table").wait_for()
        for view, width in itertools.product(("#chat", "#dashboard", "#try"), (320, 375, 768, 1280, 2560)):
            page.evaluate("hash => { location.hash = hash; }", view)
            page.set_viewport_size({"width": width, "height": 700})
            page.evaluate("() => new Promise(requestAnimationFrame)")
            wide = page.evaluate(
                """() => [...document.querySelectorAll("main > section:not([hidden]), #thread, #top, body")]
                .filter(node => node.scrollWidth > node.clientWidth).map(node => node.id)"""
            )
            assert (view, width, wide) == (view, width, [])

    @pytest.mark.parametrize("width", [375, 1280])
    def test_text_twice_as_large_as_usual(self, demo_server, visit, expect, width):
        page = visit(demo_server, viewport={"width": width, "height": 800})
        page.context.new_cdp_session(page).send("Page.setFontSizes", {"fontSizes": {"standard": 32, "fixed": 26}})
        page.wait_for_function("() => getComputedStyle(document.documentElement).fontSize === '32px'")
        for view in ("dashboard", "try", "chat"):
            page.evaluate("view => { location.hash = '#/' + view; }", view)
            wide = page.evaluate(
                """() => [...document.querySelectorAll("main > section:not([hidden]), .route, #thread, #top, body")]
                .filter(node => node.scrollWidth > node.clientWidth).map(node => node.id || node.className)"""
            )
            assert (view, wide) == (view, [])
            for name in ("Theme: system", *(["Settings"] if view == "chat" else [])):
                expect(page.get_by_role("button", name=name, exact=True)).to_be_in_viewport(ratio=1)

    def test_panels_on_a_phone(self, demo_server, visit, expect):
        page = visit(demo_server, viewport={"width": 375, "height": 700})
        ask(page, "Hello")
        page.get_by_role("button", name="Conversations").click()
        expect(page.get_by_role("button", name="New chat")).to_be_focused()
        assert page.evaluate("document.getElementById('talk').inert")
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Conversations")).to_be_focused()
        expect(page.locator("#list")).to_be_hidden()
        page.get_by_role("button", name="Settings", exact=True).click()
        page.mouse.click(10, 400)  # beside the panel
        expect(page.locator("#settings")).to_be_hidden()
        page.get_by_role("button", name="Conversations").click()
        page.get_by_role("button", name="New chat").click()
        expect(page.locator("#welcome")).to_be_visible()

    def test_the_keyboard_reaches_everything_and_shows_where_it_is(self, demo_server, visit, expect):
        page = visit(demo_server)
        ask(page, "Hello")
        page.locator("#skip").focus()
        expect(page.locator("#skip")).to_be_in_viewport()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "content"
        seen = set()
        for _ in range(25):
            page.keyboard.press("Tab")
            name, shown = page.evaluate("""() => {
                const node = document.activeElement, style = getComputedStyle(node);
                const around = getComputedStyle(node.parentElement);
                return [node.ariaLabel || node.id || node.textContent.trim(), style.outlineStyle !== "none"
                    || around.boxShadow !== "none" || node === document.body];
            }""")
            assert shown, name
            seen.add(name)
        assert {
            "new",
            "Rename Hello",
            "Delete Hello",
            "export",
            "import",
            "Messages",
            "Copy the answer",
            "Edit the message",
            "Regenerate the answer",
            "input",
        } <= seen

    def test_the_focus_is_not_lost(self, demo_server, visit, expect):
        page = visit(demo_server)
        ask(page, "Hello")
        page.get_by_role("button", name="New chat").click()
        ask(page, "Tell me a joke.")
        row = page.get_by_role("button", name="Hello", exact=True)
        row.focus()
        page.keyboard.press("Enter")
        page.evaluate("save(current)")  # as every other second while an answer comes
        expect(row).to_be_focused()
        page.get_by_role("button", name="Rename Hello").press("Enter")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Rename Hello")).to_be_focused()
        page.get_by_role("button", name="Edit the message").press("Enter")
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Edit the message")).to_be_focused()
        page.get_by_role("button", name="Regenerate the answer").press("Enter")
        expect(page.locator("#thread")).to_be_focused()
        page.get_by_role("button", name="Delete Hello").press("Enter")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="New chat")).to_be_focused()

    def test_reduced_motion_is_kept(self, endless, visit):
        with local_server(endless) as server:
            page = visit(server, reduced_motion="reduce")
            assert (
                page.evaluate(
                    "getComputedStyle(Object.assign(document.querySelector('#timeline').appendChild("
                    "document.createElement('div')))).transitionDuration"
                )
                == "0s"
            )


SAMPLE = r"""# Heading *one*

Some **bold**, *emphasis*, ~~gone~~, `co*d*e`, ***both***, snake_case_name and 2 * 3 * 4 stay.
A second line with a [link](https://example.com/a_(b) "title"), <https://example.com/x> and https://example.com/y.

- one
- two
  - inner **x**
  - inner 2

    more of inner 2
- [x] done

3. three
4. four
   ```sh
   echo hi
   ```
5. five

> quoted *text*
> - item

| name | size | mid |
|:-----|-----:|:---:|
| `a\|b` | 12 | x |
| c | **13** | y<br>z |

after the table

```python
def f(x):
    return "<b>" + `x`

# not a heading
```
---
***
* star
+ plus
1) paren

\*escaped\* ![picture](https://example.com/p.png) **unclosed and [broken](
"""


class TestMarkdown:
    @pytest.fixture(scope="class")
    @classmethod
    def page(cls, browser, demo_server):
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(demo_server.url)
            yield page

    def html(self, page, *steps):
        """The nodes of a text that comes in steps, as markup."""
        return page.evaluate(
            """steps => {
            const root = document.createElement("div"), markdown = new Markdown(root);
            let text = "";
            for (const step of steps) { text += step; markdown.set(text); while (!markdown.advance()); }
            for (const button of root.querySelectorAll("button")) button.remove();
            return root.innerHTML;
        }""",
            list(steps),
        )

    def test_it_builds_what_the_text_means(self, page):
        html = self.html(page, SAMPLE)
        for part in (
            "<h3>Heading <em>one</em></h3>",
            "<strong>bold</strong>",
            "<s>gone</s>",
            "<code>co*d*e</code>",
            "<strong>both</strong>",
            "snake_case_name and 2 * 3 * 4 stay",
            'href="https://example.com/a_(b)" target="_blank" rel="noopener noreferrer nofollow"',
            ">https://example.com/y</a>.",
            "<li>two<ul><li>inner <strong>x</strong></li>",
            "<p>more of inner 2</p>",
            "<li>☑ done</li>",
            '<ol start="3"><li>three</li><li>four',
            "echo hi",
            "<li>five</li></ol>",
            "<blockquote><p>quoted <em>text</em></p><ul><li>item</li></ul></blockquote>",
            '<th class="right">size</th>',
            "<code>a|b</code>",
            "<strong>13</strong>",
            "y<br>z",
            "<p>after the table</p>",
            'return "&lt;b&gt;" + `x`\n\n# not a heading',
            "<hr><hr>",
            "*escaped*",
            'Image: <a href="https://example.com/p.png"',
            "**unclosed and [broken](",
        ):
            assert part in html, (part, html)

    @pytest.mark.parametrize(
        "text, html",
        [
            ("* a\n\t+ b\n\t\t- c\n\n\t+ d\n* e", "<li>a<ul><li>b<ul><li>c</li></ul></li><li>d</li></ul></li><li>e"),
            ("-\tone\n-\ttwo", "<ul><li>one</li><li>two</li></ul>"),
            ("a | b\n---\nc", "<p>a | b</p><hr><p>c</p>"),
            ("|a|b|c|\n|-|-|\n|1|2|3|", "<td>1</td><td>2</td><td>3</td>"),
            ("a\\\nb", "<p>a\nb</p>"),
            ("a\r\n\r\nb", "<p>a</p><p>b</p>"),
            ("(https://example.com/a_(b)_c).", '(<a href="https://example.com/a_(b)_c" '),
        ],
    )
    def test_what_models_write(self, page, text, html):
        assert html in self.html(page, text)

    @pytest.mark.parametrize("text", [SAMPLE, "x\na | b\n- c | d\n", "x\na | b\n  - | c\n", "```\nx\n   ~~"])
    def test_streamed_in_any_pieces_it_is_the_same(self, page, text):
        whole = self.html(page, text)
        for size in (1, 2, 3, 7, 50):
            assert self.html(page, *(text[at : at + size] for at in range(0, len(text), size))) == whole, size

    @pytest.mark.parametrize(
        "text",
        [
            "```\nopen",
            "```",
            "a\n\n```js\nlet x\n``",
            "~~~\n```\n~~~",
            "- ",
            "1. a\n\n\n2. b",
            "> ",
            "|a|b|\n|-|",
            "|a|b|\n|-|-|\n|c",
            "\n\n  \n",
            "*" * 50,
            "[" * 50,
            "`" * 9,
            "> " * 40 + "deep",
            "- " * 40 + "deep",
            "a\\",
            "# ",
            "#",
            "x" * 20000,
            "word " * 5000,
            "```\n" + "x" * 20000 + "\n```",
            "```\n" + "line\n" * 5000,
            " " * 1000 + "x",
            "a\u202eb",
        ],
    )
    def test_odd_texts_in_pieces(self, page, text):
        size = max(1, len(text) // 40)
        assert self.html(page, *(text[at : at + size] for at in range(0, len(text), size))) == self.html(page, text)

    @pytest.mark.parametrize(
        "address, safe",
        [
            ("https://example.com/", True),
            ("http://example.com/?a=b&c=d", True),
            ("mailto:a@example.com", True),
            ("javascript:alert(1)", False),
            ("JaVaScRiPt:alert(1)", False),
            ("java\tscript:alert(1)", False),
            ("data:text/html,<script>1</script>", False),
            ("vbscript:x", False),
            ("//example.com", False),
            ("/v1/queue", False),
            ("file:///etc/passwd", False),
            ("blob:https://a/b", False),
        ],
    )
    def test_links_go_to_the_web_and_to_mail_alone(self, page, address, safe):
        html = self.html(page, f"[text]({address}) ![text]({address}) <{address}>")
        targets = set(re.findall('href="([^"]*)"', html))
        assert targets <= {address.replace("&", "&amp;"), "https://a/b"} and (len(targets) == 1 or not safe)
        assert not any(target.startswith("blob:") for target in targets)


class TestHostile:
    @contextlib.contextmanager
    def answered(self, llm, speak, visit, *pieces):
        speak(*pieces)
        with local_server(llm) as server:
            page = visit(server)
            yield page, ask(page, "Hello")

    def test_markup_is_text(self, demo_llm, speak, visit):
        text = (
            "<script>window.ran = 1</script><img src=x onerror='window.ran=1'><iframe"
            " srcdoc='<script>parent.ran=1</script>'><style>*{display:none}</style><svg onload=ran=1><a"
            " href='javascript:ran=1'>x</a>\n\n[click](javascript:window.ran=1) ![x](javascript:ran=1)"
            " <javascript:ran=1>"
            " [a](data:text/html,<script>1</script>)\n\n```<script>window.ran=1</script>\n</code></pre>"
            "<script>window.ran=1</script>\n```\n\n|"
            " <b>a</b> | b |\n|---|---|\n| <img src=x onerror=ran=1> | [z](JAVASCRIPT:ran=1) |\n"
        )
        with self.answered(demo_llm, speak, visit, text[:70], text[70:]) as (page, answer):
            assert page.evaluate("window.ran") is None
            assert (
                answer.locator("script, img, iframe, style, b:not(.facts b), .md a, [onerror], [onload]").count() == 0
            )
            assert "<script>window.ran = 1</script>" in answer.inner_text()

    def test_a_link_tells_where_it_goes_and_gives_nothing_away(self, demo_llm, speak, visit):
        with self.answered(demo_llm, speak, visit, "[https://good.example](https://bad.example/path)") as (
            page,
            answer,
        ):
            link = answer.locator("a")
            assert link.get_attribute("title") == link.get_attribute("href") == "https://bad.example/path"
            assert link.get_attribute("target") == "_blank" and "noopener" in link.get_attribute("rel")

    def test_direction_overrides_are_shown_and_do_not_act(self, demo_llm, speak, visit):
        text = "file\u202egpj.exe `a\u2066b` \u202dx\n\n```\nif admin\u202e\u2066 { \n```"
        with self.answered(demo_llm, speak, visit, text) as (page, answer):
            shown = answer.locator(".md").inner_text()
            assert not re.search("[\u202a-\u202e\u2066-\u2069]", shown)
            assert "fileU+202Egpj.exe" in shown and answer.locator(".control").count() == 5

    def test_tool_titles_and_names_are_text_too(self, demo_llm, speak, visit, expect):
        with local_server(demo_llm) as server:
            page = visit(server)
            ask(page, '"><img src=x onerror=window.ran=1>')
            expect(page.locator("#items .open")).to_contain_text("<img")
            assert page.evaluate("window.ran") is None and page.locator("#items img, #thread img").count() == 0

    def test_direction_overrides_do_not_act_in_titles_names_and_errors(self, demo_server, visit, expect):
        page = visit(demo_server)
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "a\u202eb"}]}))
        page.route(
            "**/v1/chat/completions", lambda route: route.fulfill(status=400, json={"error": {"message": "no\u2066pe"}})
        )
        page.reload()
        page.wait_for_selector("#status[data-state=ready]")
        expect(page.locator("#welcome-model")).to_have_text("aU+202Eb")
        expect(page.locator("#status")).to_contain_text("aU+202Eb")
        send(page, "x\u202ey")
        expect(page.locator(".problem")).to_contain_text("noU+2066pe")
        page.get_by_role("button", name="Delete xU+202Ey").click()
        expect(page.get_by_role("dialog")).to_contain_text("“xU+202Ey” is kept nowhere else.")

    def test_a_title_is_not_cut_through_a_character(self, demo_server, visit, expect):
        page = visit(demo_server)
        ask(page, "a" * 59 + "\U0001f389")
        expect(page.locator("#items .open")).to_have_text("a" * 59)

    @pytest.mark.parametrize(
        "kind, text",
        [
            ("one line", "x" * 200_000),
            ("words", "word *and* [more " * 12_000),
            ("code", "```\n" + "0123456789" * 20_000),
            ("paragraphs", "A paragraph of **some** `length`.\n\n" * 6_000),
            ("list", "- item [x](https://example.com)\n" * 6_000),
            ("nested", "> " * 3000 + "- " * 3000 + "*" * 20000 + "[" * 20000 + "`" * 20001 + "<" * 20000 + "(" * 20000),
            ("table", "| a | b |\n|---|---|\n" + "| `1` | **2** |\n" * 10_000),
        ],
    )
    def test_200_kb_leave_the_page_usable(self, demo_llm, speak, visit, expect, kind, text):
        with self.answered(demo_llm, speak, visit, *(text[at : at + 4000] for at in range(0, len(text), 4000))) as (
            page,
            answer,
        ):
            page.fill("#input", "still here")
            expect(page.locator("#input")).to_have_value("still here")
            page.get_by_role("link", name="Dashboard").click()
            expect(page.get_by_role("heading", name="The machine at work")).to_be_visible()
            assert page.evaluate("current.messages[1].content.length") == len(text)
            page.wait_for_function("() => dirty.size === 0")
            assert len(answer.locator(".md").text_content()) > 19_000

    def test_a_broken_stream_of_events_is_told(self, demo_llm, visit, expect):
        with local_server(demo_llm) as server:
            page = visit(server)
            broken = {"error": {"message": "it <b>broke</b>", "code": "x"}}
            for data, text in (({"choices": []}, "cut off"), (broken, "it <b>broke</b>")):
                answer = {"body": f"data: {json.dumps(data)}\n\n", "content_type": "text/event-stream"}
                page.unroute_all()
                page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))
                send(page, "Hello")
                expect(page.locator(".problem")).to_contain_text(text)
