-- What tenants use of their limits. `run:<tenant>` is the set of their rids that have not ended, `tenants` the set of
-- tenants that have any. `t:<tenant>` (only where there are limits) holds the limits `concurrent`, `rpm` and `tpm`
-- ('' = none) and two token buckets: `requests` and `tokens` say what is left, as of `requests_at` and `tokens_at`. A
-- bucket refills its size in a minute and may go below zero: costs that are known only later are taken from it all the
-- same, and are paid first.

local LIMITS_STAY = 86400000 -- milliseconds that a tenant's limits stay after its last request

local function number_text(x) return string.format('%.3f', x) end

-- What is left in a bucket now.
local function refilled(key, bucket, size, now)
  local v = redis.call('HMGET', key, bucket, bucket .. '_at')
  if not v[1] then return size end
  return math.min(size, tonumber(v[1]) + (now - tonumber(v[2])) * size / 60000)
end

-- Milliseconds until a bucket has more than `need`.
local function wait_ms(left, size, need)
  return math.ceil((need - left) * 60000 / size) + 1
end

-- Which limit a further request of `tenant` meets and for how many milliseconds; nil if none. `prompt` is its tokens.
local function met_limit(tenant, prompt, now)
  local key = P .. 't:' .. tenant
  local v = redis.call('HMGET', key, 'concurrent', 'rpm', 'tpm')
  local concurrent, rpm, tpm = tonumber(v[1] or ''), tonumber(v[2] or ''), tonumber(v[3] or '')
  if concurrent and redis.call('SCARD', P .. 'run:' .. tenant) >= concurrent then return 'concurrent', 1000 end
  if tpm then
    if prompt >= tpm then return 'prompt', 0 end
    local left = refilled(key, 'tokens', tpm, now)
    if left - prompt <= 0 then return 'tokens', wait_ms(left, tpm, prompt) end
  end
  if rpm then
    local left = refilled(key, 'requests', rpm, now)
    if left < 1 then return 'requests', wait_ms(left, rpm, 1) end
  end
end

-- Count a request in: it runs from now on, its prompt is paid for. -> tokens that were reserved, '' where there is no limit
local function begin_request(tenant, rid, prompt, now)
  local key = P .. 't:' .. tenant
  redis.call('SADD', P .. 'run:' .. tenant, rid)
  redis.call('SADD', P .. 'tenants', tenant)
  local v = redis.call('HMGET', key, 'rpm', 'tpm')
  local rpm, tpm = tonumber(v[1] or ''), tonumber(v[2] or '')
  if not v[1] then return '' end
  redis.call('PEXPIRE', key, LIMITS_STAY)
  if rpm then
    redis.call('HSET', key, 'requests', number_text(refilled(key, 'requests', rpm, now) - 1), 'requests_at', now)
  end
  if not tpm then return '' end
  redis.call('HSET', key, 'tokens', number_text(refilled(key, 'tokens', tpm, now) - prompt), 'tokens_at', now)
  return prompt
end

-- What is left of the requests and tokens per minute, as text; '' where there is no such limit.
local function rate_left(tenant, now)
  local key = P .. 't:' .. tenant
  local v = redis.call('HMGET', key, 'rpm', 'tpm')
  local rpm, tpm = tonumber(v[1] or ''), tonumber(v[2] or '')
  return rpm and number_text(refilled(key, 'requests', rpm, now)) or '',
    tpm and number_text(refilled(key, 'tokens', tpm, now)) or ''
end
