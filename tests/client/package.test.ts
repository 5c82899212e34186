/** The package as npm installs it. */
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import test from "node:test";
import * as root from "music-separation";
import * as webhook from "music-separation/webhook";

const require = createRequire(import.meta.url);

test("modules and CommonJS have the same names", () => {
  for (const [name, module] of [["music-separation", root], ["music-separation/webhook", webhook]] as const) {
    const required: object = require(name);
    assert.deepEqual(Object.keys(required).sort(), Object.keys(module).sort());
    assert.ok(require.resolve(name).includes("/dist/cjs/") && import.meta.resolve(name).includes("/dist/esm/"));
  }
});

test("the package depends on no other", () => {
  const about = require("music-separation/package.json") as Record<string, unknown>;
  for (const kind of ["dependencies", "peerDependencies", "optionalDependencies"]) assert.equal(about[kind], undefined);
});
