"""The types of `samples/js/adapters.js` are those of the module, and what a host writes in TypeScript fits them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

from javascript import SAMPLES, needs_node, node

pytestmark = needs_node
TSC = SAMPLES / "node_modules" / "typescript" / "bin" / "tsc"
TYPES = SAMPLES / "js" / "adapters.d.ts"


def test_a_host_in_typescript_compiles_and_a_wrong_one_does_not(tmp_path):
    node(TSC, "-p", SAMPLES / "js")
    shutil.copytree(SAMPLES / "js", tmp_path / "js")
    (tmp_path / "node_modules").symlink_to(SAMPLES / "node_modules")
    usage = tmp_path / "js" / "usage.ts"
    usage.write_text(usage.read_text(encoding="utf-8").replace("{ kind: 0.5 }]", '{ kind: "much" }]'))
    command = ["node", str(TSC), "-p", str(tmp_path / "js")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "is not assignable to parameter of type 'readonly RowAdapter[] | RowAdapter'" in done.stdout


def test_the_types_name_what_the_module_has(tmp_path):
    script = tmp_path / "names.mjs"
    script.write_text(f"""
        import * as module from "{SAMPLES}/js/adapters.js";
        const methods = Object.getOwnPropertyNames(module.ExportedFolder.prototype);
        console.log(JSON.stringify({{ exported: Object.keys(module), methods }}));
    """)
    found = json.loads(node(script))
    text = TYPES.read_text(encoding="utf-8")
    assert set(re.findall(r"export (?:class|function) (\w+)", text)) == set(found["exported"])
    body = text[text.index("export class ExportedFolder") :].partition("\n}")[0]
    assert set(re.findall(r"^  (\w+)\(", body, re.MULTILINE)) == set(found["methods"])
