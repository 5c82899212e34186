-- The jobs, one row a prediction. `stems` is a JSON object, a URL a stem by the stem's name.
CREATE TABLE IF NOT EXISTS jobs (
  replicate_id TEXT PRIMARY KEY,
  status TEXT NOT NULL,
  stems TEXT,
  error TEXT
);

-- The webhooks that were handled in the last minutes, so that none is handled twice.
CREATE TABLE IF NOT EXISTS deliveries (
  webhook_id TEXT PRIMARY KEY,
  sent_at INTEGER NOT NULL
);
