/** Says errors and figures in words. */

const LONG_SECONDS = 3600;

const HEADS = {
  connection_lost: "The connection to the service was lost",
  rate_limit_exceeded: "Too many requests with this key",
  quota_exceeded: "The tokens of this month are used up",
  unauthorized: "This key is not valid, or no longer",
  context_length_exceeded: "The conversation is longer than the model can read",
  pii_blocked: "The message holds personal data, which this service refuses",
};
const STATUS_HEADS = {
  401: HEADS.unauthorized,
  403: "This key may not do that",
  404: "That does not exist, or no longer",
  413: "The message is too long",
  429: HEADS.rate_limit_exceeded,
  500: "The service failed",
  503: "The service cannot answer now",
  504: "The answer took too long",
};

/** A head line, the service's own sentence, and the seconds after which the same may succeed (null: unknown). */
export function inWords(error) {
  const head = HEADS[error.code] ?? STATUS_HEADS[error.status] ?? "The answer failed";
  const seconds = error.retryAfter;
  if (seconds && seconds > LONG_SECONDS) {
    const when = new Date(Date.now() + seconds * 1000).toLocaleString();
    return { head, text: `${error.message} It is possible again on ${when}.`, seconds: null };
  }
  return { head, text: error.message, seconds };
}

/** The same in one line. */
export function inOneLine(error) {
  const { head, text } = inWords(error);
  return `${head}. ${text}`;
}

export const whole = (number) => Math.round(number).toLocaleString();

export function seconds(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}

export function bytes(number) {
  if (number === null || number === undefined) return "unknown";
  const units = ["B", "KB", "MB", "GB", "TB"];
  let size = number;
  let unit = 0;
  while (size >= 1000 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${size < 10 && unit ? size.toFixed(1) : Math.round(size)} ${units[unit]}`;
}

/** How long ago, roughly. */
export function ago(date) {
  const minutes = Math.max(0, (Date.now() - new Date(date)) / 60_000);
  if (minutes < 1) return "just now";
  if (minutes < 60) return `${Math.floor(minutes)} min ago`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ago`;
  return new Date(date).toLocaleDateString();
}
