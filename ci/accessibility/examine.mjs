// Opens report pages in headless Chromium as people see them (desktops of 1024 to 1600 px, a phone of 360 px, light, dark,
// print) and prints, as JSON lines, every axe-core violation, every page that scrolls sideways and every table that a desktop
// cuts. Exit 0 none, 1 some.
//
//   node examine.mjs CHROMIUM [--screenshots FOLDER] PAGE.html...
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import puppeteer from "puppeteer-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
// A4 without its margins of 12 mm, at 96 dots an inch.
const views = [
  { name: "desktop", width: 1280, scheme: "light", media: "screen" },
  { name: "narrow-desktop", width: 1024, scheme: "light", media: "screen" },
  { name: "wide-desktop", width: 1600, scheme: "light", media: "screen" },
  { name: "desktop-dark", width: 1280, scheme: "dark", media: "screen" },
  { name: "phone", width: 360, scheme: "light", media: "screen" },
  { name: "phone-dark", width: 360, scheme: "dark", media: "screen" },
  { name: "print", width: 703, scheme: "light", media: "print" },
];

async function examine(page, file, view) {
  await page.setViewport({ width: view.width, height: 800, isMobile: view.width < 500, hasTouch: view.width < 500 });
  await page.emulateMediaType(view.media);
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: view.scheme }]);
  await page.goto(pathToFileURL(resolve(file)).href);
  await page.evaluate(axe);
  const { violations, passes } = await page.evaluate(() => axe.run(document, { resultTypes: ["violations", "passes"] }));
  const found = violations.map(({ id, help, nodes }) => ({ rule: id, help, at: nodes.map((n) => n.target.join(" ")) }));
  // Not window.innerWidth, which a phone widens to what it has to show.
  const sideways = (await page.evaluate(() => document.scrollingElement.scrollWidth)) - view.width;
  if (sideways > 0) found.push({ rule: "reflow", help: `the page is ${sideways} px wider than the screen`, at: ["html"] });
  // A desktop has room for every table; a phone's may scroll by themselves.
  const clipped = await page.$$eval(".scroll", (all) => all.filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.getAttribute("aria-labelledby")));
  if (clipped.length && view.width >= 1000) found.push({ rule: "clipped", help: "a table is wider than its place", at: clipped });
  if (passes.length < 10) found.push({ rule: "axe", help: `only ${passes.length} rules applied`, at: ["html"] });
  return found;
}

const [chromium, ...rest] = process.argv.slice(2);
const screenshots = rest[0] === "--screenshots" ? resolve(rest[1]) : null;
if (screenshots) mkdirSync(screenshots, { recursive: true });
const files = screenshots ? rest.slice(2) : rest;
const browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox", "--disable-gpu"] });
let count = 0;
try {
  const page = await browser.newPage();
  for (const file of files) {
    for (const view of views) {
      const found = await examine(page, file, view);
      count += found.length;
      for (const violation of found) console.log(JSON.stringify({ file, view: view.name, ...violation }));
      if (screenshots) {
        const path = join(screenshots, `${basename(file, ".html")}-${view.name}.png`);
        await page.screenshot({ path, fullPage: true });
      }
    }
    if (screenshots) await page.pdf({ path: join(screenshots, `${basename(file, ".html")}.pdf`), preferCSSPageSize: true });
  }
} finally {
  await browser.close();
}
console.error(`${files.length} pages in ${views.length} views: ${count} violations`);
process.exit(count ? 1 : 0);
