/**
 * Workers in the real workerd with a real D1, for the tests: bundled like wrangler does, run by miniflare. `worker.ts` and
 * `schema.sql` are copies of those in the package.
 */
import { readFile } from "node:fs/promises";
import { build, type BuildResult } from "esbuild";
import { Miniflare } from "miniflare";

export interface Row {
  replicate_id: string;
  status: string;
  stems: string | null;
  error: string | null;
}

export type Database = Awaited<ReturnType<Miniflare["getD1Database"]>>;

export interface Receiver {
  url: string;
  database: Database;
  rows: () => Promise<Row[]>;
  close: () => Promise<void>;
}

/** worker.ts with an empty database. */
export async function startReceiver(secret: string): Promise<Receiver> {
  const worker = new Miniflare({
    modules: true,
    script: await bundle('export { default } from "./worker.js";'),
    compatibilityDate: "2026-01-01",
    d1Databases: ["DB"],
    bindings: { REPLICATE_WEBHOOK_SECRET: secret },
  });
  const database = await worker.getD1Database("DB");
  await createTables(database);
  return {
    url: (await worker.ready).href,
    database,
    rows: async () => (await database.prepare("SELECT * FROM jobs ORDER BY rowid").all<Row>()).results,
    close: () => worker.dispose(),
  };
}

export async function createTables(database: Database): Promise<void> {
  for (const statement of (await readFile("schema.sql", "utf8")).split(";")) {
    if (statement.trim()) await database.prepare(statement).run();
  }
}

/** Runs `body` in a Worker, with `Separator` and `request` in scope, and returns its response as text. */
export async function runInWorker(body: string, compatibilityFlags: string[]): Promise<string> {
  const code = `import { Separator } from "music-separation";
    export default { async fetch(request) { ${body} } };`;
  const script = await bundle(code);
  const worker = new Miniflare({ modules: true, script, compatibilityDate: "2026-01-01", compatibilityFlags });
  try {
    return await (await worker.dispatchFetch("http://worker.test/")).text();
  } finally {
    await worker.dispose();
  }
}

/** The files that a bundle with worker.ts consists of. */
export async function bundledFiles(): Promise<string[]> {
  const { metafile } = await bundled('export { default } from "./worker.js";');
  return Object.keys(metafile.inputs).filter((name) => name !== "<stdin>");
}

async function bundle(contents: string): Promise<string> {
  return (await bundled(contents)).outputFiles[0]!.text;
}

function bundled(contents: string): Promise<BuildResult<{ write: false; metafile: true }>> {
  return build({
    stdin: { contents, resolveDir: process.cwd(), loader: "ts" },
    bundle: true,
    format: "esm",
    platform: "browser",
    write: false,
    metafile: true,
  });
}
