"""People at browsers: Debian's Chromium, in which only the test servers have an address."""

import shutil
from urllib.parse import urlsplit

from playwright.sync_api import expect, sync_playwright

from world import HERE

PICTURES = HERE / "screenshots"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]
# Every answer comes from this machine: what is slower is stuck.
PATIENCE = 30_000


class Chromium:
    """The program, of which each person gets a part of their own."""

    def __init__(self, ports):
        addresses = {"auth.test": ports["auth"], "app.test": ports["app"], "login.test": ports["app"]}
        rules = [f"MAP {name}:443 127.0.0.1:{port}" for name, port in addresses.items()]
        rules += ["MAP * ~NOTFOUND", "EXCLUDE 127.0.0.1", "EXCLUDE localhost"]
        self.playwright = sync_playwright().start()
        self.program = self.playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=[*FLAGS, f"--host-resolver-rules={', '.join(rules)}"], timeout=120_000,
        )
        expect.set_options(timeout=PATIENCE)

    def close(self):
        self.program.close()
        self.playwright.stop()


class Person:
    """Someone at a browser, with cookies that nobody else has."""

    def __init__(self, chromium, **options):
        self.context = chromium.program.new_context(ignore_https_errors=True, **options)
        self.context.set_default_timeout(PATIENCE)
        self.requested = []  # every URL that a page of theirs asked for
        self.violations = []  # of a page's own content security policy
        self.context.on("request", lambda request: self.requested.append(request.url))
        self.context.on("console", self._console)
        self.page = self.context.new_page()

    def _console(self, message):
        if "Content Security Policy" in message.text:
            self.violations.append(message.text)

    def leave(self, last_page):
        self.page.screenshot(path=last_page, full_page=True)
        self.context.close()

    def open(self, url):
        return self.page.goto(url)

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def heading(self):
        return self.page.get_by_role("heading", level=1).inner_text()

    def tab_to(self, name):
        """Moves by Tab alone until the focus is on the button or link that is called so."""
        for _ in range(50):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("document.activeElement.innerText || document.activeElement.value || ''").strip() == name:
                return
        raise AssertionError(f"50 times Tab never came to {name!r}")

    def sees(self, heading):
        expect(self.page.get_by_role("heading", level=1)).to_have_text(heading)

    def sees_code(self, code):
        expect(self.page.locator("code", has_text=code).first).to_be_visible()

    def text(self):
        return self.page.locator("body").inner_text()

    def picture(self, name):
        PICTURES.mkdir(exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{name}.png", full_page=True)

    def hosts(self):
        """Whom their browser has talked to."""
        return {urlsplit(url).hostname for url in self.requested if url.startswith("http")}

    def log_in(self, login):
        """At the provider, which knows again whom it has seen before."""
        self.page.wait_for_url("https://auth.test/interaction/*")
        if self.page.title() == "Log in":
            self.page.get_by_label("Login").fill(login)
            self.press("Log in")

    def consent(self, login="alice"):
        """Says who one is, and allows what is asked."""
        self.log_in(login)
        self.press("Allow")

    def refuse(self, login="alice"):
        self.log_in(login)
        self.press("Refuse")

    def enter_code(self, code):
        """At the provider's page for devices."""
        self.page.get_by_label("Code").fill(code)
        self.press("Continue")

    def way_back(self):
        """Where a provider that was told to pause would send the browser next."""
        return self.page.locator("#onward").get_attribute("href")

    def connect(self, running, provider="main", user="default", login="alice"):
        self.open(f"{running.admin}/connect/{provider}?user={user}")
        self.press("Continue to Main")
        self.consent(login)
        self.sees("Main is connected")

    def row(self, user="default"):
        """The row of one connection, on a dashboard that is open."""
        return self.page.locator(f"tr[data-provider='main'][data-user='{user}']")

    def sees_state(self, running, state, user="default"):
        self.open(f"{running.admin}/")
        expect(self.row(user)).to_have_attribute("data-state", state)

    def clicks_in_row(self, running, name, user="default"):
        self.open(f"{running.admin}/")
        self.row(user).get_by_text(name, exact=True).click()

    def disconnects(self, running, user="default"):
        self.clicks_in_row(running, "Disconnect", user)
        expect(self.row(user).get_by_text("Disconnect", exact=True)).to_have_count(0)
