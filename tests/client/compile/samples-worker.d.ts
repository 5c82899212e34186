/** What the samples of Workers take as given. */
interface Env {
  DB: D1Database;
  REPLICATE_WEBHOOK_SECRET: string;
}
declare function triggerTranscription(env: Env, id: string, stems: Partial<Record<string, string>>): Promise<void>;
