/**
 * A Cloudflare Worker that receives Replicate's webhooks and stores each prediction's stems in D1 (schema.sql).
 *
 * A request may change a row only if it is signed with the account's secret, was sent within the last five minutes, and
 * has not been handled before. All others are answered with 401.
 *
 * - A replay is a request whose `webhook-id` has been handled. When Replicate retries a webhook because it got no 2xx,
 *   it keeps the id and renews the timestamp. The id is stored in the same transaction as the row, so the retry of a
 *   webhook that could not be stored (500) does not count as a replay. If only the response was lost, the retry gets a
 *   harmless 401: the row is there.
 * - Ids are kept until their timestamp is too old; from then on, the timestamp alone refuses a replay.
 * - A prediction's row only moves forward (starting, processing, finished) and then never changes. Further webhooks
 *   with other ids are answered with 200 and change nothing: Replicate may send one twice, and an earlier stage's
 *   webhook may arrive after the final one.
 */
import { receiveWebhook, WebhookError, type Webhook } from "music-separation/webhook";

export interface Env {
  DB: D1Database;
  /** From GET /v1/webhooks/default/secret: whsec_ and base64. */
  REPLICATE_WEBHOOK_SECRET: string;
}

const TOLERANCE_SECONDS = 5 * 60;

export default {
  async fetch(request: Request, env: Env): Promise<Response> {
    try {
      const webhook = await receiveWebhook(request, env.REPLICATE_WEBHOOK_SECRET);
      const isNew = await store(webhook, env.DB);
      return isNew ? new Response("stored\n") : new Response("the webhook was already handled\n", { status: 401 });
    } catch (error) {
      if (error instanceof WebhookError) return error.toResponse();
      throw error;
    }
  },
} satisfies ExportedHandler<Env>;

/** Stores the prediction, unless the webhook's id has been handled. Returns whether it had not. */
async function store({ id, sentAt, separation }: Webhook, database: D1Database): Promise<boolean> {
  const { stems, error } = separation;
  const status = error !== null && separation.status === "succeeded" ? "failed" : separation.status;
  const [delivery] = await database.batch([
    database.prepare("INSERT INTO deliveries (webhook_id, sent_at) VALUES (?1, ?2) ON CONFLICT DO NOTHING").bind(id, sentAt),
    database
      .prepare(
        `INSERT INTO jobs (replicate_id, status, stems, error) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (replicate_id) DO UPDATE SET status = ?2, stems = ?3, error = ?4
         WHERE jobs.status IN ('starting', 'processing') AND ?2 <> 'starting'`,
      )
      .bind(separation.id, status, stems && JSON.stringify(stems), error && error.message),
    database.prepare("DELETE FROM deliveries WHERE sent_at < ?1").bind(Date.now() / 1000 - TOLERANCE_SECONDS),
  ]);
  return delivery?.meta.changes === 1;
}
