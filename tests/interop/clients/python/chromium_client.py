"""Debian's Chromium, driven by Playwright. It is told of no proxy and of no certificate: HOME says whom it trusts."""

import shutil
import sys

from playwright.sync_api import sync_playwright
from turns import take_turns

call_url, events_url = sys.argv[1:]
READ = """async (url) => {
    const reader = (await fetch(url)).body.pipeThrough(new TextDecoderStream()).getReader();
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) console.log(piece.value);
}"""

with sync_playwright() as playwright:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
    page = browser.new_page()
    page.on("console", lambda message: print(message.text, flush=True))

    def call():
        answer = page.goto(call_url)
        assert answer.ok, f"answered {answer.status}"
        return answer.text().strip()

    def events():
        page.evaluate(READ, events_url)
        return []

    take_turns(call, events)
    browser.close()
