/** The package's types, and the samples in the documents, compile with every TypeScript from 5.4 on. */
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { cp, mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import test from "node:test";
import { promisify } from "node:util";
import { project } from "./served.js";

const VERSIONS = ["5.4", "5.5", "5.6", "5.7", "5.8", "5.9", "6.0", "7.0"];
const STRICT = { strict: true, exactOptionalPropertyTypes: true, noUncheckedIndexedAccess: true, noEmit: true };
const DOM = { ...STRICT, target: "es2022", lib: ["es2022", "dom", "dom.iterable"], types: [], skipLibCheck: false };
const NODE = { ...STRICT, target: "es2022", lib: ["es2022"], types: ["node"], skipLibCheck: true };

/** Compiles a folder below this one. Returns what the compiler prints; nothing, if it is content. */
async function compile(version: string, folder: string, compilerOptions: object): Promise<string> {
  await writeFile(join(folder, "tsconfig.json"), JSON.stringify({ compilerOptions, include: ["*"] }));
  const tsc = join("node_modules", version === "7.0" ? "typescript" : `typescript-${version}`, "bin", "tsc");
  const installed = (await promisify(execFile)(process.execPath, [tsc, "--version"])).stdout;
  assert.ok(installed.startsWith(`Version ${version}.`), installed);
  return promisify(execFile)(process.execPath, [tsc, "--project", folder])
    .then(({ stdout }) => stdout)
    .catch((error: { stdout: string }) => error.stdout || String(error));
}

/** A folder with one file, compiled with each version. */
async function everywhere(name: string, code: string, options: (version: string) => object): Promise<void> {
  for (const version of VERSIONS) {
    const folder = join("compile", `${name.split(".")[0]}-${version}`);
    await mkdir(folder, { recursive: true });
    await writeFile(join(folder, name), code);
    assert.equal(await compile(version, folder, options(version)), "", version);
  }
}

test("in a module of Node and for bundlers, by the types of Node", async () => {
  const code = await readFile("compile/types.ts", "utf8");
  await everywhere("node.mts", code, () => ({ ...NODE, module: "nodenext" }));
});

test("in CommonJS, by the types of browsers, which checks the declarations too", async () => {
  const code = await readFile("compile/types.ts", "utf8");
  await everywhere("browser.cts", code, () => ({ ...DOM, module: "nodenext" }));
});

test("for bundlers, and as old projects resolve modules", async () => {
  const code = await readFile("compile/types.ts", "utf8");
  await everywhere("bundler.ts", code, () => ({ ...DOM, module: "esnext", moduleResolution: "bundler" }));
  const older = VERSIONS.filter((version) => version < "7"); // which no longer resolves in this way
  for (const version of older) {
    const folder = join("compile", `old-${version}`);
    await mkdir(folder, { recursive: true });
    await writeFile(join(folder, "old.ts"), code);
    const silence = version === "6.0" ? { ignoreDeprecations: "6.0" } : {};
    assert.equal(await compile(version, folder, { ...DOM, ...silence, module: "commonjs", moduleResolution: "node" }), "");
  }
});

interface Sample {
  name: string;
  code: string;
}

/** The TypeScript samples of all documents. */
async function samples(): Promise<Sample[]> {
  const found: Sample[] = [];
  const documents = ["README.md", "client/README.md", ...(await readdir(join(project(), "docs"))).map((name) => `docs/${name}`)];
  for (const document of documents.filter((name) => name.endsWith(".md"))) {
    const text = await readFile(join(project(), document), "utf8");
    for (const [index, [, code]] of [...text.matchAll(/^```typescript\n([^]*?)^```$/gm)].entries()) {
      found.push({ name: `${document.replace(/\W/g, "_")}_${index}`, code: `${code!}\nexport {};\n` });
    }
  }
  return found;
}

async function compileSamples(version: string, given: Sample[], worker: boolean): Promise<string> {
  const folder = join("compile", `samples-${version}`);
  await rm(folder, { recursive: true, force: true });
  await mkdir(folder, { recursive: true });
  const declared = worker ? "samples-worker.d.ts" : "samples.d.ts";
  await cp(join("compile", declared), join(folder, declared));
  for (const { name, code } of given) await writeFile(join(folder, `${name}.mts`), code);
  const types = [worker ? "@cloudflare/workers-types" : "node"];
  return compile(version, folder, { ...NODE, module: "nodenext", types });
}

const isWorker = ({ code }: Sample): boolean => code.includes("ExportedHandler");

test("every sample in the documents", async () => {
  const all = await samples();
  assert.ok(all.length >= 8, `there are ${all.length} samples`);
  for (const version of VERSIONS) {
    for (const worker of [false, true]) {
      const given = all.filter((sample) => isWorker(sample) === worker);
      assert.ok(given.length > 0);
      assert.equal(await compileSamples(version, given, worker), "", version);
    }
  }
});

test("a sample that is wrong does not compile", async () => {
  const [sample] = (await samples()).filter(({ code }) => code.includes('stems: "all_4"') && !isWorker({ name: "", code }));
  const wrong = { name: "wrong", code: sample!.code.replace('"all_4"', '"all_5"') };
  for (const version of VERSIONS) assert.match(await compileSamples(version, [wrong], false), /"all_5"/);
});
