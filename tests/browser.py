"""A browser that tests drive: chromium over a pipe, one page at a time."""

import json
import os
import subprocess
from base64 import b64decode

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
    "--disable-domain-reliability", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """Opens pages. Of the last one: `said` is what the console says, `asked` what it asks for."""

    def __init__(self, profile):
        (reader, self._out), (self._in, writer) = os.pipe(), os.pipe()
        # the browser reads descriptor 3 and writes 4
        moved = f'exec chromium {" ".join(_FLAGS)} --user-data-dir="$0" 3<&{reader} 4>&{writer}'
        self._process = subprocess.Popen(
            ["bash", "-c", moved, profile], pass_fds=(reader, writer), stderr=subprocess.DEVNULL
        )
        os.close(reader)
        os.close(writer)
        self._rest, self._calls, self._session, self._events = b"", 0, None, []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, file, width=1400, scheme="light", media="screen"):
        """Load a page and wait until it is complete."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", media=media, features=features)
        self._events.clear()
        self._call("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()
        self.run("0")

    @property
    def said(self):
        texts = [e["params"] for e in self._events if e["method"] == "Log.entryAdded"]
        found = [entry["entry"]["text"] for entry in texts]
        thrown = [e["params"] for e in self._events if e["method"] == "Runtime.exceptionThrown"]
        return found + [e["exceptionDetails"]["exception"]["description"] for e in thrown]

    @property
    def asked(self):
        sent = [e["params"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in sent][1:]  # the first is the page

    def run(self, script):
        """The value of an expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def point(self, selector):
        """Move the pointer to the middle of the first element that matches."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView()")
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = (
            self.run(f"{box}.{a} + {box}.{b} / 2") for a, b in (("left", "width"), ("top", "height"))
        )
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key)

    def picture(self, file):
        """Write the whole page as PNG."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(b64decode(shot["data"]))

    def _call(self, method, **parameters):
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self):
        while b"\0" not in self._rest:
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        received = json.loads(message)
        if "method" in received:
            self._events.append(received)
        return received
