// Use the page of samples/web as a person would, in headless Chromium, and print what came of it.
//
//   node page.mjs URL STEPS.json SCREENSHOTS [FLAG...]
//
// STEPS.json: [{ do: "type" | "choose" | "add" | "remove" | "load", line?, text?, adapter?, file? }]. Printed: what the page shows after
// it opened and after each step, how often each file was fetched, and how wide the page is on each screen.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
const { chromium } = createRequire(new URL("../../samples/package.json", import.meta.url))("playwright-core");

const [url, steps, screenshots, ...flags] = process.argv.slice(2);
const quiet = ["background-networking", "component-update", "sync", "quic"].map((what) => `--disable-${what}`);
const gpu = flags.length ? flags : ["--disable-gpu"];
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  headless: true,
  args: ["--no-sandbox", "--no-first-run", ...quiet, ...gpu],
});
const found = { states: [], fetched: {}, widths: {}, errors: [] };
try {
  const page = await browser.newPage({ viewport: { width: 1200, height: 800 } });
  page.setDefaultTimeout(240_000);
  page.on("pageerror", (error) => found.errors.push(error.message));
  page.on("requestfinished", (request) => {
    const path = new URL(request.url()).pathname;
    found.fetched[path] = (found.fetched[path] ?? 0) + 1;
  });
  const look = async () => {
    await page.waitForFunction(() => document.body.dataset.running !== "true");
    found.states.push(
      await page.evaluate(() => {
        const shown = (id) => (document.getElementById(id).hidden ? "" : document.getElementById(id).textContent);
        const lines = [...document.querySelectorAll("#lines li")].map((line) => ({
          text: line.querySelector("textarea").value,
          adapter: line.querySelector(":checked")?.value,
          shown: [...line.querySelectorAll(".score")].map((row) => row.innerText.split("\n")),
        }));
        return {
          lines,
          found: globalThis.found ?? [],
          problem: shown("problem"),
          status: shown("status"),
          device: document.body.dataset.ready,
        };
      }),
    );
  };
  await page.goto(url);
  await page.waitForSelector("body[data-ready], #problem:not([hidden])");
  await look();
  for (const { do: what, line, text, adapter, file } of JSON.parse(await readFile(steps))) {
    const place = line === undefined ? page : page.locator("#lines li").nth(line);
    if (what === "type") await place.getByLabel("Text").fill(text);
    else if (what === "choose") await place.getByText(adapter, { exact: true }).first().click();
    else if (what === "add") await page.getByRole("button", { name: "Add a line" }).click();
    else if (what === "remove") await place.getByRole("button", { name: "Remove this line" }).click();
    else if (what === "load") await page.setInputFiles("#file", file);
    else throw new Error(`no step ${what}`);
    await page.waitForTimeout(50);
    await look();
  }
  for (const [name, width, height, colorScheme] of [
    ["desktop", 1200, 800, "light"],
    ["phone", 390, 844, "dark"],
    ["narrow", 320, 640, "light"],
  ]) {
    await page.setViewportSize({ width, height });
    await page.emulateMedia({ colorScheme });
    found.widths[name] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
    await page.screenshot({ path: `${screenshots}/${name}.png`, fullPage: true });
  }
} finally {
  await browser.close();
}
console.log(JSON.stringify(found));
