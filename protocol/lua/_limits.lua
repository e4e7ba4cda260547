-- In the home slot: what tenants use of their limits. `run:<tenant>` holds a reservation for each of its requests that has
-- not ended, over all models and shards: rid -> slot (the model, or the shard's tag) and tokens that were reserved;
-- `holds:<slot>` the same ones by the time of the next look at them. `t:<tenant>` (only where there are limits) holds the
-- limits `concurrent`, `rpm` and `tpm` ('' = none) and two token buckets: `requests` and `tokens` say what is left, as of
-- `requests_at` and `tokens_at`. A bucket refills its size in a minute and may go below zero: costs that are known only
-- later are taken from it all the same, and are paid first.
-- Money: `terms` holds what gateways read in the table of routes, budgets (`b:<tenant>`: money a day, '-': it is counted and
-- nothing is refused) and prices (`p:<model>`: of a million prompt and of a million output tokens). `spent:<day>` is what
-- tenants have spent on a day of Unix time, in billionths; `held:<tenant>` the prompt tokens of its reservations, by slot.

local LIMITS_STAY = 86400000 -- milliseconds that a tenant's limits stay after its last request

local SPENT_STAY = 3 * 86400000

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

-- The limits of a tenant: requests at once, requests and tokens per minute; nil where there is none.
local function limits_of(tenant)
  local v = redis.call('HMGET', P .. 't:' .. tenant, 'concurrent', 'rpm', 'tpm')
  return tonumber(v[1] or ''), tonumber(v[2] or ''), tonumber(v[3] or '')
end

-- Which limit a further request of `tenant` meets and for how many milliseconds; nil if none. `prompt` is its tokens.
local function met_limit(tenant, prompt, now)
  local key = P .. 't:' .. tenant
  local concurrent, rpm, tpm = limits_of(tenant)
  if concurrent and redis.call('HLEN', P .. 'run:' .. tenant) >= concurrent then return 'concurrent', 1000 end
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

-- Take from the buckets of a tenant (negative numbers give back). Nothing where it has no such limit.
local function take(tenant, requests, tokens, now)
  local key = P .. 't:' .. tenant
  local _, rpm, tpm = limits_of(tenant)
  if rpm and requests ~= 0 then
    redis.call('HSET', key, 'requests', number_text(refilled(key, 'requests', rpm, now) - requests), 'requests_at', now)
  end
  if tpm and tokens ~= 0 then
    redis.call('HSET', key, 'tokens', number_text(refilled(key, 'tokens', tpm, now) - tokens), 'tokens_at', now)
  end
end

-- What is left of the requests and tokens per minute, as text; '' where there is no such limit.
local function rate_left(tenant, now)
  local key = P .. 't:' .. tenant
  local _, rpm, tpm = limits_of(tenant)
  return rpm and number_text(refilled(key, 'requests', rpm, now)) or '',
    tpm and number_text(refilled(key, 'tokens', tpm, now)) or ''
end

-- What tokens of a slot cost, in billionths.
local function cost(slot, prompt, output)
  local price = redis.call('HGET', P .. 'terms', 'p:' .. string.match(slot, '^[^#]+')) or ''
  local input, per_output = string.match(price, '^(%S+) (%S+)$')
  if not input then return 0 end
  return math.floor((tonumber(input) * prompt + tonumber(per_output) * output) * 1000 + 0.5)
end

local function day_of(now) return math.floor(now / 86400000) end

local function spend(tenant, money, now)
  if money == 0 then return end
  local key = P .. 'spent:' .. day_of(now)
  redis.call('HINCRBY', key, tenant, string.format('%.0f', money))
  redis.call('PEXPIRE', key, SPENT_STAY)
end

-- Whether a tenant has spent its budget of the day, with the prompts that it has reserved.
local function over_budget(tenant, budget, now)
  local sum = tonumber(redis.call('HGET', P .. 'spent:' .. day_of(now), tenant) or 0)
  local held = redis.call('HGETALL', P .. 'held:' .. tenant)
  for i = 1, #held, 2 do sum = sum + cost(held[i], tonumber(held[i + 1]), 0) end
  return sum >= budget * 1e9
end

local function hold(tenant, rid, slot, tokens, first_look)
  redis.call('HSET', P .. 'run:' .. tenant, rid, slot .. ' ' .. tokens)
  redis.call('HINCRBY', P .. 'held:' .. tenant, slot, tokens)
  redis.call('ZADD', P .. 'holds:' .. slot, first_look, tenant .. ' ' .. rid)
end

-- End a reservation. -> the tokens that it had reserved; nil if there is none
local function end_hold(tenant, rid)
  local run = P .. 'run:' .. tenant
  local slot, tokens = string.match(redis.call('HGET', run, rid) or '', '^(%S+) (%d+)$')
  if not slot then return nil end
  redis.call('HDEL', run, rid)
  redis.call('ZREM', P .. 'holds:' .. slot, tenant .. ' ' .. rid)
  redis.call('HINCRBY', P .. 'held:' .. tenant, slot, string.format('%d', -tonumber(tokens))) -- Redis 7 refuses '-0'
  if redis.call('EXISTS', run) == 0 then redis.call('DEL', P .. 'held:' .. tenant) end
  return tonumber(tokens)
end
