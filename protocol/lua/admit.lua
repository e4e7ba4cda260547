-- Turn an inbox entry into a request that can run: its prompt ids and seed are stored, once.
-- KEYS: leader. ARGV: P, epoch, entry id, rid, seed, admission row ('' = join.lua tells), 'hit' where the answer is known
-- already (else ''), number of prompts, prompts...,
-- and for a producer's push further: tenant, id, body, hash, n, timeout_ms, channel, results, hash of the payload, tokens
-- of its reservation in the home slot ('' = none), entry id under which it was pushed, name of its id (that of a push
-- without one is made of that entry id)
-- -> {verdict, rid}: new | repeat | cancelled | gone | duplicate | conflict (the id is another body's: `reject` takes the
--    entry and tells) | void (the claim of its id was freed: the push stays, to be claimed anew)
allow_when_full()
local epoch, entry, rid, seed, row, count = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[8])
if not is_leader(epoch) then return fenced('epoch') end
local live, jobs, record, push = P .. 'live', P .. 'jobs', P .. 'r:' .. rid, 8 + count

local prompt_tokens = 0
for k = 0, count - 1 do prompt_tokens = prompt_tokens + #ARGV[9 + k] / 4 end

-- Delete the entry; 0 if it was gone already.
local function take()
  redis.call('XACK', jobs, 'scheduler', entry)
  return redis.call('XDEL', jobs, entry)
end

if #ARGV == push then -- it went through accept: the record is there
  local v = redis.call('HMGET', record, 'open', 'seed', 'cancel', 'tenant', 'charged')
  if not v[1] or v[1] == '0' then
    if not v[1] then redis.call('HDEL', live, rid) end
    take()
    return {'gone', rid}
  end
  if v[2] then take() return {'repeat', rid} end
  if v[3] then return {'cancelled', rid} end -- `finish` takes the entry
  take()
  if v[5] and v[5] ~= '' then -- what the gateway guessed is set right
    owe(v[4], prompt_tokens - tonumber(v[5]))
    if ARGV[7] ~= 'hit' then owe_money('in', v[4], prompt_tokens) end
    redis.call('HSET', record, 'charged', prompt_tokens)
  end
else
  local tenant, id, body, hash, n = ARGV[push + 1], ARGV[push + 2], ARGV[push + 3], ARGV[push + 4], ARGV[push + 5]
  local timeout, channel, results = tonumber(ARGV[push + 6]), ARGV[push + 7], ARGV[push + 8]
  local idem = 'idem:' .. tenant .. ':' .. ARGV[push + 12]
  local owner, owner_hash = string.match(redis.call('GET', P .. idem) or '', '^(%S+) (%S+)$')
  if owner and owner_hash ~= hash and owner_hash ~= ARGV[push + 9] then return {'conflict', owner} end
  local now = milliseconds()
  if not owner and redis.call('EXISTS', P .. 'void:' .. rid) == 1 then return {'void', ''} end
  if take() == 0 then return (owner and owner ~= '-') and {'repeat', owner} or {'gone', ''} end
  if owner then return {'duplicate', owner} end
  -- the push was durable from the moment of its XADD, which its entry id tells
  local created = string.match(ARGV[push + 11], '^(%d+)%-') or now
  if tonumber(created) > tonumber(now) then created = now end
  local deadline = timeout > 0 and string.format('%.0f', tonumber(created) + timeout) or '0'
  redis.call('HSET', record, 'body', body, 'hash', hash, 'tenant', tenant, 'id', id, 'deadline', deadline,
    'created', created, 'attempts', 0, 'n', n, 'open', n, 'attached', 0, 'results', results, 'idem', idem,
    'charged', ARGV[push + 10])
  if ARGV[push + 10] ~= '' then redis.call('HSET', record, 'reaches', 1) end
  if ARGV[push + 10] ~= '' and ARGV[7] ~= 'hit' then owe_money('in', tenant, prompt_tokens) end
  begin_request(tenant, rid)
  redis.call('HSET', live, rid, channel)
  redis.call('SET', P .. idem, rid .. ' ' .. hash)
end

redis.call('HSET', record, 'seed', seed)
for k = 0, count - 1 do redis.call('HSET', record, 'prompt:' .. k, ARGV[9 + k]) end
if ARGV[7] ~= '' then redis.call('HSET', record, 'cache', ARGV[7]) end
if row == '' then return {'new', rid} end
for name in string.gmatch(redis.call('HGET', live, rid) or '', '%S+') do
  redis.pcall(PUBLISH, P .. 'out:' .. name, row)
end
return {'new', rid}
