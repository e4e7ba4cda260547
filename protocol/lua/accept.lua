-- Make a request durable. Begins with a write that is refused when the server is out of memory.
-- ARGV: P, rid, n, tenant, body, hash, timeout_ms, channel, results, id, idempotency key name without prefix,
--       prompt_tokens, the bounds requests, tokens, tenant_requests, tenant_tokens ('' = unbounded), the tokens of its
--       reservation in the home slot ('' = none), and the least level of a leader that can read the body; '1': the rid is
--       that of an earlier claim of the key, so that another caller may have made the request, or make it at this moment
-- -> {'ok', rid} | {'joined', rid, attached} | {'conflict'} | {'full'} | {'busy', waiting tokens, tokens per second}
--    | {'older'}: the leader cannot read it | {'void'}: the claim was freed
local rid, n, tenant, body, hash, timeout = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7])
local channel, results, id, idem, prompt_tokens = ARGV[8], ARGV[9], ARGV[10], ARGV[11], tonumber(ARGV[12])
local live, record = P .. 'live', P .. 'r:' .. rid

local claimed = ARGV[19] == '1'

local function join(owner)
  allow_when_full()
  if channel ~= '' and not add_channel(owner, channel) then return {'full'} end
  return {'joined', owner, redis.call('HINCRBY', P .. 'r:' .. owner, 'attached', 1)}
end

if redis.call('EXISTS', record) == 1 then
  if not claimed then return {'ok', rid} end -- repeated after a lost reply
  if redis.call('HGET', record, 'hash') ~= hash then return {'conflict'} end
  return join(rid)
end
if redis.call('EXISTS', P .. 'void:' .. rid) == 1 then return {'void'} end

if idem ~= '' then
  local owner, owner_hash = string.match(redis.call('GET', P .. idem) or '', '^(%S+) (%S+)$')
  if owner and owner_hash ~= hash then return {'conflict'} end
  if owner == '-' then return {'conflict'} end -- the id of a push that was rejected
  if owner and redis.call('EXISTS', P .. 'r:' .. owner) == 1 then return join(owner) end
end

if tonumber(ARGV[18]) > 0 then
  local leader = redis.call('HMGET', P .. 'leader', 'epoch', 'level')
  local epoch, level = string.match(leader[2] or '', '^(%d+):(%d+)$')
  local led = tonumber(leader[1] or 0) > 0 -- before the first leader comes, it may be any
  if led and (epoch ~= leader[1] or tonumber(level) < tonumber(ARGV[18])) then return {'older'} end
end

local now = milliseconds()
local depth = redis.call('HMGET', P .. 'depth', 'requests', 'tokens', 'requests:' .. tenant, 'tokens:' .. tenant, 'rate')
for i = 1, 5 do depth[i] = tonumber(depth[i]) or 0 end
depth[1] = depth[1] + redis.call('XLEN', P .. 'jobs')
for i = 1, 4 do
  local bound = tonumber(ARGV[12 + i])
  -- a single request may exceed a bound on tokens while nothing else waits: else it could never be accepted
  local more = (i % 2 == 1) and 1 or (depth[i] > 0 and prompt_tokens or 0)
  if bound and depth[i] + more > bound then
    return {'busy', tostring(depth[2]), tostring(depth[5])}
  end
end

local deadline = timeout > 0 and string.format('%.0f', tonumber(now) + timeout) or '0'
redis.call('XADD', P .. 'jobs', '*', 'rid', rid) -- first: where it fails, nothing is there that looks accepted
redis.call('HSET', record, 'body', body, 'hash', hash, 'tenant', tenant, 'id', id, 'deadline', deadline, 'created', now,
  'attempts', 0, 'n', n, 'open', n, 'attached', claimed and 1 or 0, 'results', results, 'idem', idem,
  'charged', ARGV[17])
if ARGV[17] ~= '' then redis.call('HSET', record, 'reaches', 1) end
begin_request(tenant, rid)
redis.call('HSET', live, rid, channel)
if idem ~= '' then redis.call('SET', P .. idem, rid .. ' ' .. hash) end
return {'ok', rid}
